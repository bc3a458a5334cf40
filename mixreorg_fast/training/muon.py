"""The update of Muon (Jordan et al., 2024): momentum, orthogonalised matrix by matrix.

An orthogonalised update has the same size in every direction of a matrix, where Adam's follows the few directions of
the largest gradients. Updates are scaled to the size of Adam's (Liu et al., 2025, arXiv 2502.16982, section 2.2), so
that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranks import all_gather, rank

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan's quintic iteration
ADAMS_SIZE = 0.2  # root mean square of Adam's updates, in learning rates


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """About ``U @ Vᵀ`` of matrices ``U @ S @ Vᵀ``, ``[M, O, C]``, by Newton-Schulz iterations in `dtype`.

    The singular values of the result, which is in `dtype`, lie between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)  # singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def directions(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The orthogonalised and scaled form of each matrix ``[O, C]``, fp32; those of one shape are computed together."""
    shapes: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(number)
    out = list(matrices)
    for shape, numbers in shapes.items():
        together = orthogonalised(torch.stack([matrices[number] for number in numbers]), dtype).float()
        together *= ADAMS_SIZE * max(shape) ** 0.5
        for number, direction in zip(numbers, together, strict=True):
            out[number] = direction
    return out


class Flat:
    """Matrices that lie end to end in one flat tensor, of which each rank holds an equal part (ZeRO 1 and 2)."""

    def __init__(self, zero: Any):
        """`zero`: DeepSpeed's optimizer, whose first group holds the matrices."""
        shapes = [parameter.flatten(1).shape for parameter in zero.round_robin_bit16_groups[0]]
        self.matrices = list(zip(zero.round_robin_bit16_offsets[0], shapes, strict=True))

    def directions(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's part of the :func:`directions` of all matrices, of its `part` of them.

        A rank computes the matrices that its part holds at least a piece of.
        """
        whole, start = all_gather(part), rank() * len(part)
        end = start + len(part)
        held = [(at, shape) for at, shape in self.matrices if at < end and at + shape.numel() > start]
        out = torch.zeros_like(part)
        found = directions([whole[at : at + shape.numel()].view(shape) for at, shape in held], dtype)
        for (at, shape), direction in zip(held, found, strict=True):
            first, last = max(at, start), min(at + shape.numel(), end)
            out[first - start : last - start] = direction.flatten()[first - at : last - at]
        return out
