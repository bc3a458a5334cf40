"""Registers, spills and shared memory of every kernel on every supported GPU; no GPU is needed:
``python -m mixreorg_fast.resources``.

The network, in training and in evaluation, and the ops in their other modes run on meta tensors, while Triton compiles
each of their launches for the GPU in question.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from . import ops
from .config import Config, merged, parse_config
from .kernels.settings import LogitBlock
from .kernels.variants import ARCHITECTURES, SHARED_BYTES
from .models import Batch, GroupViT, MixReorg
from .ops.contrastive_blocks import TRITON

IMAGES, CLASSES, WORDS = 64, 150, 24
_FP32, _SOFT = {"train": {"precision": "fp32"}}, {"model": {"hard_assignment": False, "gumbel": False}}
BASE = {"model": {"text": {"layers": 1, "vocab_size": 512}}, "train": {"compile": False, "precision": "bf16"}}
# Changes of the default configuration, which is the paper's, that make other variants of the kernels run.
TRAININGS = {
    "training": {},
    "training in fp32": _FP32,
    "training, soft assignment": _SOFT,
    "training, soft assignment in fp32": _FP32 | _SOFT,
    "training, noun prompts, small images": {
        "model": {"image_size": 48, "patch_size": 8, "width": 96, "heads": 3, "groups": [8, 3], "embed_dim": 64},
        "loss": {"multi_label": 1.0},
    },
    "training at 448 pixels": {"model": {"image_size": 448}},
}
EVALUATIONS = {"evaluation": {}, "evaluation, soft assignment": {"model": {"hard_assignment": False}}}


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything that launches kernels, by a name for it."""
    for name, changes in TRAININGS.items():
        yield name, lambda changes=changes: _train(_config(changes))
    for name, changes in EVALUATIONS.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{name} in {dtype}", lambda changes=changes, dtype=dtype: _evaluate(_config(changes), dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"ops in {dtype}", lambda dtype=dtype: _ops(dtype)


def _config(changes: dict) -> Config:
    return parse_config(merged(BASE, changes))


def _train(config: Config) -> None:
    """One micro-step, forward and backward."""
    with torch.device("meta"):
        side, context = config.model.image_size, config.model.text.context
        ids = torch.zeros(IMAGES, context, dtype=torch.int64)
        batch = Batch(torch.zeros(IMAGES, 3, side, side), ids, [WORDS] * IMAGES, _seed())
        if config.loss.multi_label:
            batch.noun_ids, batch.noun_lengths = ids[:, None].expand(-1, 3, -1), [WORDS] * 3 * IMAGES
        model = MixReorg(config)
    model(batch)["loss"].backward()


def _evaluate(config: Config, dtype: torch.dtype) -> None:
    """Labels of the pixels of square and of long photos, with and without a background."""
    with torch.device("meta"):
        model = GroupViT(config.model).to(dtype).eval()
        texts = torch.zeros(CLASSES, config.model.embed_dim)
    for height, width in ((224, 224), (448, 448), (448, 672)):
        images = torch.zeros(1, 3, height, width, device="meta")
        for threshold in (None, 0.5):
            model.segment_labels(images, texts, size=(375, 500), background_threshold=threshold)


def _ops(dtype: torch.dtype) -> None:
    """Modes and shapes of the public ops that the network does not ask for."""
    for groups, patches, channels in ((64, 196, 384), (8, 64, 384), (128, 300, 100), (7, 13, 40), (64, 100, 128)):
        for hard in (True, False):
            for wanted in ("none", "soft", "used"):
                q, k, v = (_leaf(IMAGES, rows, channels, dtype=dtype) for rows in (groups, patches, patches))
                out = ops.grouping_attention(q, k, v, hard=hard, seed=_seed(), return_assignment=wanted, impl="triton")
                _backward(out)
    plan = ops.MixPlan.sample(IMAGES, 196, 4, seed=_seed(), device="meta", impl="triton")
    for channels in (384, 100):
        x = _leaf(IMAGES, 196, channels, dtype=dtype)
        mixed = ops.patch_mix(x, plan, impl="triton")
        _backward(ops.patch_restore(ops.patch_blend(mixed, x, plan, 0.5, impl="triton"), plan, impl="triton"))
        for groups in (64, 0):
            x = _leaf(IMAGES, 196 + groups, channels, dtype=dtype)
            for own, keep in ((None, True), (_leaf(1, groups, channels, dtype=dtype), False)):
                tokens = ops.blend_tokens(ops.mix_tokens(x, plan, own, impl="triton"), plan, 0.5, impl="triton")
                _backward(ops.restore_tokens(tokens, plan, own, keep_mixed=keep, impl="triton"))
    ops.stochastic_depth(_seed(), [0.1] * 12, IMAGES, branches=3, impl="triton")
    for first, second, size in ((64, 8, 4), (128, 64, 16)):
        plan = ops.MixPlan.sample(IMAGES, 196, size, seed=_seed(), device="meta", impl="triton")
        shapes = ((first, 196), (second, first), (second, 256), (256,))
        maps, pooled, segments, texts = (_leaf(IMAGES, *shape, dtype=dtype) for shape in shapes)
        _backward(ops.mixed_segmentation_loss(maps, pooled, segments, texts, plan, 10.0, impl="triton"))
    for width in (256, 128, 100, 64):
        image, texts = _leaf(IMAGES, width, dtype=dtype), _leaf(IMAGES, 3, width, dtype=dtype)
        _backward(ops.contrastive_loss(image, texts, 10.0, impl="triton"))
        scale = torch.empty((), device="meta")
        rows, columns = image.detach(), texts.detach().flatten(0, 1)  # of all ranks, where there are several
        lse, others = TRITON.log_sum_exp(rows, columns, scale, False)[0], columns.new_empty(len(columns))
        TRITON.gradient(rows, columns, lse, others.float(), scale, LogitBlock(1, 3, first_row=64, both=False))
    for groups, size in ((8, (448, 448)), (64, (375, 500)), (3, (31, 37))):
        maps, scores = _leaf(2, groups, 28, 28, dtype=dtype), _leaf(2, groups, CLASSES, dtype=dtype)
        for threshold in (None, 0.5):
            ops.decode_segments(maps, scores, size, background_threshold=threshold, impl="triton")


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _seed() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="meta")


def _backward(out: Tensor | tuple[Tensor, ...]) -> None:
    outputs = [out] if isinstance(out, Tensor) else out
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def main() -> int:
    """Print one JSON object per architecture and variant of a kernel, with the call that runs it first."""
    from .kernels.offline import offline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", metavar="TEXT", help="only calls whose name contains TEXT")
    parser.add_argument("--check", action="store_true", help="fail if a kernel does not fit or is miscompiled")
    options = parser.parse_args()
    wrong = 0
    for architecture in options.architectures:
        with offline(architecture) as launches:
            known = set()
            for name, call in calls():
                if options.only not in name:
                    continue
                call()
                for launch in launches:
                    if (variant := (launch.kernel, launch.variant, launch.num_warps)) not in known:
                        known.add(variant)
                        fits = launch.shared_bytes <= SHARED_BYTES[architecture]
                        wrong += not fits or bool(launch.faults)
                        for fault in launch.faults:
                            print(f"{launch.kernel}, sm_{architecture}, {name}: {fault}", file=sys.stderr)
                        print(json.dumps({**asdict(launch), "fits": fits, "call": name}), flush=True)
                launches.clear()
    return int(options.check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
