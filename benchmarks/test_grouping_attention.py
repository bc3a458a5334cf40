"""Grouping attention as the model trains it: hard, with noise; for the mixed images also with the assignment."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mixreorg_fast import ops

from .harness import DEVICE, DTYPE, ON_GPU, Case, Work, matrix

# batch, groups, patches, channels: both groupings of the model at 224 px, the first at 448 px.
SHAPES = (
    [(1024, 64, 196, 384), (1024, 8, 64, 384), (256, 64, 784, 384)]
    if ON_GPU
    else [(16, 64, 196, 384), (16, 8, 64, 384)]
)
Returned = Literal["none", "used", "winner"]


def eager(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, returned: Returned) -> Tensor | tuple[Tensor, Tensor]:
    """GroupViT's own lines: products in the inputs' dtype, softmax in fp32, noise from PyTorch's generator."""
    logits = (q @ k.mT).float() * q.shape[2] ** -0.5
    noise = -torch.empty_like(logits).exponential_().log()
    soft = torch.softmax(logits + noise, dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    used = hard - soft.detach() + soft
    out = (used / (used.sum(dim=2, keepdim=True) + 1.0)).to(v.dtype) @ v
    return out if returned == "none" else (out, used if returned == "used" else used.argmax(dim=1))


def make_case(batch: int, groups: int, patches: int, channels: int, returned: Returned) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        q, kv = (
            torch.randn(batch, rows, width, device=DEVICE, dtype=DTYPE, generator=generator)
            for rows, width in ((groups, channels), (patches, 2 * channels))
        )
        k, v = kv.chunk(2, dim=2)  # one projection, as in the model
        seed = torch.randint(2**62, (), generator=generator, device=DEVICE)
        return *(x.requires_grad_() for x in (q, k, v)), seed

    group_rows, patch_rows = (batch * rows * channels * DTYPE.itemsize for rows in (groups, patches))
    assignment = 4 * batch * groups * patches if returned == "used" else 0
    product = 2 * batch * groups * patches * channels
    # Forward reads q, k, v and writes the output; backward reads those and the output's gradient and writes three.
    # Counted: operations that a hard assignment needs. Picking and adding rows takes no matmul.
    forward = Work(2 * group_rows + 2 * patch_rows + assignment, product)
    backward = Work(3 * group_rows + 4 * patch_rows + assignment, 3 * product)
    return Case(
        op="grouping_attention",
        shape=f"{batch}x{groups}x{patches}x{channels}" + (" with assignment" if returned == "used" else ""),
        batch=batch,
        inputs=inputs,
        implementations={
            "eager": lambda q, k, v, seed: eager(q, k, v, seed, returned),
            "triton": lambda q, k, v, seed: ops.grouping_attention(
                q, k, v, seed=seed, return_assignment=returned, impl="triton"
            ),
        },
        work={
            "fwd": forward,
            "bwd": backward,
            "fwd+bwd": Work(forward.bytes + backward.bytes, forward.flops + backward.flops),
        },
    )


CASES = [*(make_case(*shape, "none") for shape in SHAPES), make_case(*SHAPES[0], "used")]


@matrix(CASES)
def test_grouping_attention(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
