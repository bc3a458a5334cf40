"""Memory that a training step needs for every image, counted on a CPU: ``python -m benchmarks.activations``

Forward runs at full size on a few images, with a GPU's choice of kernels. No kernel is launched, because the memory
kept for backward depends on shapes alone. Compiled parts keep what torch.compile's partitioner (minimal cut) makes them
keep.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.models import MixReorg, layers
from mixreorg_fast.ops import dispatch

from .test_train_step import CAPTIONS, VOCABULARY, random_batch

attention = importlib.import_module("mixreorg_fast.ops.attention")  # the package has a function of that name
IMAGES = (4, 8)
CAPTION = 16  # tokens, the mean of CAPTIONS
BYTES_PER_PARAMETER = 16  # fp32: itself, its gradient, two moments


def saved_bytes(function: Callable[[], Any], model: nn.Module, *excluded: Tensor) -> tuple[int, Any]:
    """What graphs keep for backward once `function` ran, each storage once, without the model's own tensors and the
    `excluded`; and what it returned."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *excluded)}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is given out twice

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = function()
    return sum(storage.nbytes() for storage in kept.values()), out


def _varlen(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of PyTorch's variable-length attention."""
    return q.clone(), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), q.new_zeros(2, dtype=torch.int64)


def _launches_nothing(kernel: Any, *args: Any, **kwargs: Any) -> None:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and not x.is_floating_point():
            x.zero_()  # an index, for which 0 is valid


def bytes_kept(config: Config, images: int) -> dict[str, int]:
    """By part: "encoders", all that leads to the features of a micro-batch; "losses", of the features of a rank's whole
    batch; "features", which GradCache keeps, with their gradients."""
    from torch.nn.attention import varlen  # noqa: F401  registers the operation
    from triton.runtime.interpreter import GridExecutor

    torch.manual_seed(0)
    model = MixReorg(config)
    batch = random_batch(config, images, CAPTIONS, torch.Generator().manual_seed(0))
    batch.lengths = [CAPTION] * images
    compiling = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    layers.compiled_call.cache_clear()
    with (
        mock.patch.object(torch, "compile", partial(torch.compile, backend=compiling)),
        mock.patch.object(GridExecutor, "__call__", _launches_nothing),
        mock.patch.object(dispatch, "passed_over", lambda op, inputs: []),
        mock.patch.object(attention, "flash_reasons", lambda q: []),
        mock.patch.dict(attention.MEASURED, clear=True),
        torch.library._scoped_library("torch_attn", "IMPL") as library,
    ):
        library.impl("_varlen_attn", _varlen, "CPU")
        encoders, features = saved_bytes(lambda: model.features(batch), model, batch.images)
        features = features.cached()
        losses, _ = saved_bytes(lambda: model.losses(features), model, *features.tensors.values())
    torch._dynamo.reset()
    layers.compiled_call.cache_clear()
    cached = 2 * sum(x.nbytes for x in features.tensors.values())
    return {"encoders": encoders, "losses": losses, "features": cached}


def bytes_per_image(config: Config) -> dict[str, float]:
    """Bytes that one more image keeps, by part of :func:`bytes_kept`; what does not grow is left out."""
    few, more = (bytes_kept(config, images) for images in IMAGES)
    return {part: (more[part] - few[part]) / (IMAGES[1] - IMAGES[0]) for part in few}


def configuration(method: str, compiled: bool = True, **model: Any) -> Config:
    """Paper scale, in bf16; `model`: changes of its sizes."""
    sizes = {"method": method, "text": {"vocab_size": VOCABULARY}, **model}
    return parse_config({"model": sizes, "train": {"compile": compiled, "precision": "bf16"}})


def rows() -> list[dict[str, Any]]:
    """Megabytes (10⁶) an image, by method, compiled and eager, and part."""
    return [
        {
            "suite": "counted",
            "op": "activations",
            "what": f"{method}, {'compiled' if compiled else 'eager'}, {part}",
            "mb_per_image": size / 1e6,
        }
        for method in ("mixreorg", "groupvit")
        for compiled in (True, False)
        for part, size in bytes_per_image(configuration(method, compiled)).items()
    ]


def largest_micro_batch(config: Config, gigabytes: float, share: float = 0.9) -> int:
    """Images of a micro-step on one GPU, a power of two, that `share` of its memory (10⁹ bytes) holds under GradCache;
    0 where not even a mixing group fits."""
    per_image = bytes_per_image(config)
    parameters = sum(p.numel() for p in MixReorg(config).parameters())
    pixels = 4 * 3 * config.model.image_size**2
    whole = config.train.batch * (pixels + per_image["features"] + per_image["losses"])
    room = share * gigabytes * 1e9 - BYTES_PER_PARAMETER * parameters - whole
    images = int(room / per_image["encoders"])
    return 0 if images < config.mixing.group_size else min(1 << images.bit_length() - 1, config.train.batch)


if __name__ == "__main__":
    for row in rows():
        print("{what:36} {mb_per_image:8.2f} MB an image".format(**row))
    for gigabytes in (24, 40, 80):
        images = largest_micro_batch(configuration("mixreorg"), gigabytes)
        print(f"mixreorg on {gigabytes} GB: micro-steps of {images} images")
