"""Patch mixing and blending: nothing but memory traffic, so the limit is a copy of the same bytes."""

from __future__ import annotations

import functools

import torch

from mixreorg_fast import ops
from mixreorg_fast.ops.patch_mixing import MixPlan, patch_blend_reference, patch_mix_reference
from mixreorg_fast.ops.token_mixing import blend_tokens_reference, mix_tokens_reference, restore_tokens_reference

from .harness import DEVICE, DTYPE, ON_GPU, Case, Work, matrix

GROUP_SIZE = 4
# batch, patches, group tokens beside them, channels: the model at 224 px and at 448 px.
SHAPES = [(1024, 196, 64, 384), (256, 784, 64, 384)] if ON_GPU else [(32, 196, 64, 384)]


def tokens(generator: torch.Generator, batch: int, patches: int, groups: int, channels: int) -> torch.Tensor:
    """Patch tokens as the model holds them: a view into tokens that end with the group tokens."""
    x = torch.randn(batch, patches + groups, channels, device=DEVICE, dtype=DTYPE, generator=generator)
    return x[:, :patches].requires_grad_()


def mix_case(batch: int, patches: int, groups: int, channels: int) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        plan = MixPlan.sample(batch, patches, GROUP_SIZE, generator=generator)
        return tokens(generator, batch, patches, groups, channels), plan

    once = 2 * batch * patches * channels * DTYPE.itemsize  # read and written
    return Case(
        op="patch_mix",
        shape=f"{batch}x{patches}x{channels} K={GROUP_SIZE}",
        batch=batch,
        inputs=inputs,
        implementations={
            "eager": lambda x, plan: patch_mix_reference(x, plan.source),
            "triton": lambda x, plan: ops.patch_mix(x, plan, impl="triton"),
        },
        work={"fwd": Work(once), "bwd": Work(once), "fwd+bwd": Work(2 * once)},
    )


def blend_case(batch: int, patches: int, groups: int, channels: int) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        plan = MixPlan.sample(batch, patches, GROUP_SIZE, generator=generator)
        mixed, original = (tokens(generator, batch, patches, groups, channels) for _ in range(2))
        return mixed, original, plan

    tensor = batch * patches * channels * DTYPE.itemsize
    return Case(
        op="patch_blend",
        shape=f"{batch}x{patches}x{channels} K={GROUP_SIZE}",
        batch=batch,
        inputs=inputs,
        implementations={
            "eager": lambda mixed, original, plan: patch_blend_reference(mixed, original, plan.source, 0.5),
            "triton": lambda mixed, original, plan: ops.patch_blend(mixed, original, plan, 0.5, impl="triton"),
        },
        # forward reads two tensors and writes one, backward reads one and writes two
        work={"fwd": Work(3 * tensor), "bwd": Work(3 * tensor), "fwd+bwd": Work(6 * tensor)},
    )


def tokens_case(op: str, batch: int, patches: int, groups: int, channels: int) -> Case:
    """Whole tokens, group tokens included."""
    branches, made, eager = {
        "mix_tokens": (1, 2, lambda x, plan: mix_tokens_reference(x, plan.source, GROUP_SIZE)),
        "blend_tokens": (2, 2, lambda x, plan: blend_tokens_reference(x, plan.source, 0.5)),
        "restore_tokens": (2, 3, lambda x, plan: restore_tokens_reference(x, plan.inverse, GROUP_SIZE)),
    }[op]
    settings = (0.5,) if op == "blend_tokens" else ()

    def inputs(generator: torch.Generator) -> tuple:
        plan = MixPlan.sample(batch, patches, GROUP_SIZE, generator=generator)
        size = (branches * batch, patches + groups, channels)
        return torch.randn(size, device=DEVICE, dtype=DTYPE, generator=generator).requires_grad_(), plan

    once = (branches + made) * batch * (patches + groups) * channels * DTYPE.itemsize
    return Case(
        op=op,
        shape=f"{batch}x{patches}+{groups}x{channels} K={GROUP_SIZE}",
        batch=batch,
        inputs=inputs,
        implementations={
            "eager": eager,
            "triton": lambda x, plan: getattr(ops, op)(x, plan, *settings, impl="triton"),
        },
        work={"fwd": Work(once), "bwd": Work(once), "fwd+bwd": Work(2 * once)},
    )


CASES = [
    mix_case,
    blend_case,
    *(functools.partial(tokens_case, op) for op in ("mix_tokens", "blend_tokens", "restore_tokens")),
]


@matrix([make(*shape) for shape in SHAPES for make in CASES])
def test_mixing(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
