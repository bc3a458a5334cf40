"""Linear layers in fp32 by a CPU's two matrix libraries, between which `ops.linear` chooses. A GPU has no choice."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from mixreorg_fast import ops

from .harness import ON_GPU, Case, Work, matrix

# rows, channels in and out: the MLP of stage 1 for eight images, that of stage 3 for one.
SHAPES = [] if ON_GPU else [(2080, 384, 1536), (8, 1536, 384)]


def case(rows: int, channels: int, out: int) -> Case:
    def inputs(generator: torch.Generator) -> list[torch.Tensor]:
        sizes = ((rows, channels), (out, channels), (out,))
        return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]

    product = 2 * rows * channels * out
    return Case(
        op="linear",
        shape=f"{rows}x{channels} to {out}",
        batch=rows,
        inputs=inputs,
        implementations={"eager": F.linear, "onednn": functools.partial(ops.linear, impl="onednn")},
        work={"fwd": Work(flops=product), "bwd": Work(flops=2 * product), "fwd+bwd": Work(flops=3 * product)},
    )


@matrix([case(*shape) for shape in SHAPES])
def test_linear(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
