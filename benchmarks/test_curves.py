"""Loss curves: what makes the step fast must not change what is learned.

All implementations get the same weights, random numbers and batches: a few batches of random pairs, memorised. The gap
of two curves is the root mean square of their difference over the steps. The gap between ours and the plain-PyTorch
step (for the baseline method, Hugging Face's) must not exceed the gap between that step in bf16 and in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from mixreorg_fast.models.mixreorg import _GROUPING, Batch
from mixreorg_fast.ops.grouping_attention import grouping_noise

from . import harness, test_train_step
from .harness import CPU_BF16, DEVICE, ON_GPU
from .report import CURVES, gap

STEPS, BATCHES, IMAGES, RATE = 200, 4, 256 if ON_GPU else 16, 5e-4
SIZES = {} if ON_GPU else {"small": True, "image_size": 64}
DTYPES = [torch.float32, *([torch.bfloat16] if ON_GPU or CPU_BF16 else [])]
BASELINES = {"mixreorg": "eager", "groupvit": "huggingface"}


def losses(method: str, name: str, dtype: torch.dtype, steps: int = STEPS) -> list[float]:
    """The loss before each step."""
    config = test_train_step.configuration(method, dtype, **SIZES)
    config.train.lr = RATE
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = functools.partial(test_train_step.random_batch, config, IMAGES, test_train_step.CAPTIONS, generator)
    batches = [draw() for _ in range(BATCHES)]
    step = {
        "ours": test_train_step.ours,
        "eager": functools.partial(test_train_step.eager, same_draws=True),
        "huggingface": huggingface_with_our_noise,
    }[name](config)
    seeds = torch.arange(steps, device=DEVICE) * 1000
    curve = [step(replace(batches[i % BATCHES], seed=seeds[i])) for i in range(steps)]
    return [harness.rounded(loss) for loss in torch.stack(curve).tolist()]


def huggingface_with_our_noise(config) -> Callable[[Batch], Tensor]:
    step = test_train_step.huggingface(config)

    def within(batch: Batch) -> Tensor:
        seeds = iter([batch.seed + _GROUPING, batch.seed + _GROUPING + 3])  # of both grouping blocks

        def noisy(logits: Tensor, tau: float = 1, hard: bool = False, dim: int = -1) -> Tensor:
            noise = grouping_noise(*logits.shape, next(seeds), 0, logits.device)
            soft = ((logits + noise) / tau).softmax(dim)
            one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
            return one_hot - soft.detach() + soft

        with mock.patch("transformers.models.groupvit.modeling_groupvit.gumbel_softmax", noisy):
            return step(batch)

    return within


@pytest.mark.parametrize("method", BASELINES)
def test_loss_curves(record, method):
    names = (BASELINES[method], "ours")
    curves = record.once(
        lambda: {(name, dtype): losses(method, name, dtype) for dtype in DTYPES for name in names},
    )
    for (name, dtype), curve in curves.items():
        record(
            suite=CURVES,
            op=f"{method} loss",
            shape=f"{'small ' if SIZES else ''}{IMAGES} images",
            dtype=str(dtype).removeprefix("torch."),
            implementation=name,
            losses=curve,
        )
    if torch.bfloat16 in DTYPES:
        baseline = curves[names[0], torch.float32]
        assert gap(curves["ours", torch.float32], baseline) <= gap(curves[names[0], torch.bfloat16], baseline)
