"""The whole training step: forward of all branches, losses, backward, optimizer.

Implementations, all with the same weights' shapes, images, captions and fused optimizer:

- **eager**: the same network in plain PyTorch: SDPA, branches concatenated, captions padded to their 77 tokens, each op
  as its own benchmark's eager line, noise from PyTorch's generator. **compiled**: that under torch.compile.
- **ours**: what trains here, the defaults for this device, on a GPU with every block of the image encoder in
  a CUDA graph of its own; **ours in CUDA graphs**: captions too; **ours without CUDA graphs**.
- **huggingface**: transformers' ``GroupViTModel`` with the same weights, in ``method: groupvit`` alone.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixreorg_fast import ops
from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.convert import save_huggingface
from mixreorg_fast.inference.model import Model
from mixreorg_fast.models import Batch, MixReorg
from mixreorg_fast.models.text_encoder import TextEncoder
from mixreorg_fast.ops import dispatch
from mixreorg_fast.ops.token_mixing import blend_tokens_reference, mix_tokens_reference, restore_tokens_reference
from mixreorg_fast.training.optimisation import optimizer

from . import harness, test_contrastive_loss, test_grouping_attention, test_mixed_segmentation_loss
from .harness import CPU_BF16, DEVICE, ON_GPU, Case, Mode, Work, matrix
from .report import LARGEST_BATCH

VOCABULARY = 49408
CAPTIONS = (10, 22)  # tokens, start and end included: those of CC12M


# Of a model for cases of many steps, or of many sizes, on a CPU: every part of GroupViT-S, narrower and shallower.
SMALL = {
    "width": 96,
    "heads": 3,
    "depths": [3, 1, 1],
    "groups": [16, 4],
    "embed_dim": 64,
    "projection_hidden": 256,
    "text": {"vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2},
}


def configuration(method: str, dtype: torch.dtype, **changes) -> Config:
    """GroupViT-S; `changes`: image_size, group_size, checkpoint, and `small` for a model for a CPU."""
    sizes = SMALL if changes.get("small") else {"text": {"vocab_size": VOCABULARY}}
    return parse_config(
        {
            "model": {
                **sizes,
                "method": method,
                "image_size": changes.get("image_size", 224),
                "drop_path": 0.0 if method == "groupvit" else 0.1,  # Hugging Face has none
            },
            "mixing": {"group_size": changes.get("group_size", 4)},
            "train": {
                "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
                "checkpoint_activations": changes.get("checkpoint", False),
            },
        }
    )


def random_batch(config: Config, images: int, captions: tuple[int, int], generator: torch.Generator) -> Batch:
    side, context = config.model.image_size, config.model.text.context
    lengths = torch.randint(captions[0], captions[1] + 1, (images,), generator=generator, device=DEVICE)
    ids = torch.randint(1, VOCABULARY - 1, (images, context), generator=generator, device=DEVICE)
    place = torch.arange(context, device=DEVICE)
    ids = ids.where(place != lengths[:, None] - 1, VOCABULARY - 1).where(place < lengths[:, None], 0)
    seed = torch.randint(2**62, (), generator=generator, device=DEVICE)
    pixels = torch.randn(images, 3, side, side, generator=generator, device=DEVICE)
    return Batch(pixels, ids, lengths.tolist(), seed)


def our_model(config: Config) -> MixReorg:
    torch.manual_seed(0)
    return MixReorg(config).to(DEVICE).train()


Step = Callable[[Batch], Tensor]  # one optimizer step; its loss


def stepping(loss: Callable[[Batch], Tensor], model: nn.Module, config: Config) -> Step:
    adam = optimizer(model, config)

    def step(batch: Batch) -> Tensor:
        adam.zero_grad()
        value = loss(batch)
        value.backward()
        adam.step()
        return value.detach()

    return step


def ours(config: Config) -> Step:
    model = our_model(config)
    return stepping(lambda batch: model(batch)["loss"], model, config)


def ours_with_graphs(config: Config, on: bool) -> Step:
    config = config.model_copy(deep=True)
    config.train.cuda_graphs = on
    return ours(config)


def huggingface(config: Config) -> Step:
    transformers = pytest.importorskip("transformers", reason="needs the Hugging Face extra")
    state = our_model(config).backbone.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(Model(config.model), folder, state | {"logit_scale": state["logit_scale"].reshape(())})
        model = transformers.GroupViTModel.from_pretrained(folder).to(DEVICE).train()
    half = config.train.precision == "bf16"

    def loss(batch: Batch) -> Tensor:
        place = torch.arange(batch.ids.shape[1], device=DEVICE)
        mask = (place <= batch.ids.argmax(1, keepdim=True)).long()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            return model(input_ids=batch.ids, attention_mask=mask, pixel_values=batch.images, return_loss=True).loss

    return stepping(loss, model, config)


# ---------------------------------------------------------------------- the reference


def padded_text(self: TextEncoder, ids: Tensor, dtype: torch.dtype, lengths: object, run: Callable) -> Tensor:
    """The text encoder over all of the context."""
    x = (self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))).to(dtype)
    for block in self.blocks:
        x = run(block, x)
    return self.norm(x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, lengths: None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def random_plan(images: int, patches: int, group_size: int, *, device: torch.device, **_) -> ops.MixPlan:
    groups = images // group_size
    order = torch.rand(groups, group_size, patches, device=device).argsort(dim=1)
    first = torch.arange(groups, device=device)[:, None, None] * group_size
    source, inverse = ((first + index).flatten(0, 1).int() for index in (order, order.argsort(dim=1)))
    return ops.MixPlan(source, inverse, group_size)


def random_drops(model: MixReorg, batch: Batch) -> Tensor | None:
    drop_rates = model.backbone.image_encoder.drop_rates
    if not any(drop_rates):
        return None
    rates = torch.tensor(drop_rates, device=batch.images.device)[:, None]
    return (torch.rand(2, len(rates), 3 * len(batch.images), device=rates.device) >= rates).float() / (1 - rates)


def plain_mixed_segmentation(first, second, segments, texts, plan, scale, **_) -> tuple[Tensor, Tensor]:
    """The loss, and the share of patches whose source is found."""
    logits = test_mixed_segmentation_loss.eager_logits(first, second, segments, texts, scale)
    accuracy = (logits.detach().argmax(-1) == plan.labels).float().mean()
    return F.cross_entropy(logits.flatten(0, 1), plan.labels.flatten()), accuracy


@contextlib.contextmanager
def reference(same_draws: bool = False) -> Iterator[None]:
    """The model without this package's ops: their benchmarks' eager lines instead; `same_draws`: but with this
    package's random numbers, where losses are to be compared."""
    drawn = functools.partial(ops.grouping_attention, impl="torch")
    eager = {
        "attention": plain_attention,
        "linear": F.linear,
        "mix_tokens": lambda x, plan, groups: mix_tokens_reference(x, plan.source, plan.group_size, groups),
        "restore_tokens": lambda x, plan, groups, *, keep_mixed: restore_tokens_reference(
            x, plan.inverse, plan.group_size, groups, keep_mixed
        ),
        "blend_tokens": lambda x, plan, alpha: blend_tokens_reference(x, plan.source, alpha),
        "grouping_attention": lambda q, k, v, *, seed, return_assignment, **_: test_grouping_attention.eager(
            q, k, v, seed, return_assignment
        ),
        "contrastive_loss": lambda image, text, scale, **_: test_contrastive_loss.eager(image, text, scale),
        "mixed_segmentation_loss": plain_mixed_segmentation,
    }
    with contextlib.ExitStack() as stack:
        for name, function in eager.items():
            stack.enter_context(mock.patch.object(ops, name, function))
        if same_draws:
            stack.enter_context(mock.patch.object(ops, "grouping_attention", drawn))
        else:
            stack.enter_context(mock.patch.object(ops.MixPlan, "sample", random_plan))
            stack.enter_context(mock.patch.object(MixReorg, "_drops", random_drops))
        stack.enter_context(mock.patch.object(TextEncoder, "forward", padded_text))
        yield


def eager(config: Config, compiled: bool = False, same_draws: bool = False) -> Step:
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    model = our_model(config)
    run = torch.compile(model, dynamic=False) if compiled else model
    step = stepping(lambda batch: run(batch)["loss"], model, config)

    def within(batch: Batch) -> Tensor:
        with reference(same_draws):
            # Padded lengths are the same in every batch, so nothing is recompiled.
            return step(replace(batch, lengths=[batch.ids.shape[1]] * len(batch.ids)))

    return within


IMPLEMENTATIONS: dict[str, Callable[[Config], Step]] = {
    "eager": eager,
    "compiled": functools.partial(eager, compiled=True),
    "ours": ours,
    "ours in CUDA graphs": functools.partial(ours_with_graphs, on=True),
    "ours without CUDA graphs": functools.partial(ours_with_graphs, on=False),
    "huggingface": huggingface,
}


@functools.lru_cache(maxsize=1)  # one model in memory at a time
def built(name: str, method: str, dtype: torch.dtype, changes: tuple) -> Step:
    return IMPLEMENTATIONS[name](configuration(method, dtype, **dict(changes)))


# ---------------------------------------------------------------------- cases


class Counted(dict):
    """The operations of a step, counted on a few images of it when they are asked for."""

    def __init__(self, config: Config, images: int, captions: tuple[int, int]):
        self._config, self._images, self._captions = config, images, captions

    def __missing__(self, mode: Mode) -> Work:
        few = max(8, self._config.mixing.group_size)
        config = self._config.model_copy(deep=True)
        config.train.compile = config.train.checkpoint_activations = False  # what is done twice counts once
        batch = random_batch(config, few, self._captions, torch.Generator(DEVICE).manual_seed(0))
        with (
            mock.patch.object(dispatch, "passed_over", lambda op, inputs: ["its products are not counted"]),
            sdpa_kernel(SDPBackend.MATH),
            mock.patch.object(ops, "linear", F.linear),  # the counter does not know oneDNN's
            FlopCounterMode(display=False) as counter,
        ):
            our_model(config)(batch)["loss"].backward()
        return Work(flops=counter.get_total_flops() * self._images / few)


def make_case(
    method: str,
    images: int,
    names: tuple[str, ...],
    captions: tuple[int, int] = CAPTIONS,
    dtype: torch.dtype = harness.DTYPE,
    at: tuple[str, float] | None = None,
    **changes,
) -> Case:
    config = configuration(method, dtype, **changes)

    def run(batch: Batch, name: str) -> None:
        built(name, method, dtype, tuple(changes.items()))(batch)

    small = "small " if changes.get("small") else ""
    group = f" K={config.mixing.group_size}" if method == "mixreorg" else ""
    recomputing = " recomputing" if config.train.checkpoint_activations else ""
    return Case(
        suite="step",
        op=f"{method} step" if at is None else f"{method} step by {at[0]}",
        at=at,
        shape=f"{small}{images}x3x{config.model.image_size}²{group} captions {captions[0]}-{captions[1]}{recomputing}",
        batch=images,
        dtype=dtype,
        inputs=lambda generator: (random_batch(config, images, captions, generator),),
        implementations={name: functools.partial(run, name=name) for name in names},
        work=Counted(config, images, captions),
        modes=("step",),
    )


def cases() -> list[Case]:
    if not ON_GPU:
        half = [make_case("groupvit", 8, ("huggingface", "ours"), dtype=torch.bfloat16)] if CPU_BF16 else []
        return [
            make_case("groupvit", 8, ("huggingface", "ours")),
            *half,
            make_case("mixreorg", 4, ("eager", "ours")),
        ]
    return [
        make_case("mixreorg", 512, ("eager", "compiled", "ours", "ours in CUDA graphs", "ours without CUDA graphs")),
        make_case(
            "groupvit",
            512,
            ("eager", "compiled", "ours", "ours in CUDA graphs", "ours without CUDA graphs", "huggingface"),
        ),
        make_case("mixreorg", 512, ("ours",), checkpoint=True),
    ]


def growth_cases() -> list[Case]:
    """How the cost grows with the batch, the resolution, the mixing group and the captions; on a CPU of the small
    model."""
    case = functools.partial(make_case, "mixreorg", names=("ours",))
    if ON_GPU:
        batches, sides, images = (64, 128, 256, 512, 1024, 2048, 4096), (224, 320, 448), 512
    else:
        case = functools.partial(case, small=True)
        batches, sides, images = (16, 32, 64, 128), (64, 96, 128, 192), 32
    # The largest images need a quarter of the batch. On a CPU all images are small, except in the resolution cases.
    size = {} if ON_GPU else {"image_size": 64}
    return [
        *(case(number, at=("batch", number), **size) for number in batches),
        *(case(images // 4, at=("resolution", side), image_size=side) for side in sides),
        *(case(images, at=("group size", number), group_size=number, **size) for number in (2, 4, 8, 16)),
        *(case(images, at=("caption length", n), captions=(n, n), **size) for n in (10, 20, 40, 77)),
    ]


@matrix(cases())
def test_train_step(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)


@matrix(growth_cases())
def test_growth(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)


@pytest.mark.skipif(not ON_GPU, reason="asks a GPU for all its memory")
@pytest.mark.parametrize("checkpoint", [False, True], ids=["keeping", "recomputing"])
@pytest.mark.parametrize("method", ["mixreorg", "groupvit"])
def test_largest_batch(record, method, checkpoint):
    """The most images a step holds, to within a sixteenth."""
    built.cache_clear()
    config = configuration(method, harness.DTYPE, checkpoint=checkpoint)
    step = ours(config)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def peak_mb(images: int) -> float | None:
        torch._dynamo.reset()  # another batch, other graphs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step(random_batch(config, images, CAPTIONS, generator))
        except torch.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated() / 2**20

    def search() -> tuple[int, float | None]:
        fits, peak, unit = 0, None, 64
        while (found := peak_mb(fits + unit)) is not None:
            fits, peak, unit = fits + unit, found, max(unit, fits + unit)
        while unit > max(4, fits // 16):
            unit //= 2
            if (found := peak_mb(fits + unit)) is not None:
                fits, peak = fits + unit, found
        return fits, peak

    fits, peak = record.once(search)
    if not fits:
        pytest.skip("not even 64 images fit")
    record(
        suite="step",
        op=LARGEST_BATCH,
        shape=f"{method} 3x224²{' recomputing' if checkpoint else ''}",
        dtype=str(harness.DTYPE).removeprefix("torch."),
        implementation="ours",
        images=fits,
        peak_mb=peak,
    )
