"""The numbers that ops hand to their kernels beside tensors: one type for each op that takes several.

An op's public function makes one; autograd, custom op and launcher pass it on whole (``ops/registration.py`` spreads it
for the custom op's schema).
"""

from __future__ import annotations

from typing import NamedTuple


class Grouping(NamedTuple):
    """Settings of ``ops.grouping_attention``; the fields are its arguments."""

    scale: float
    hard: bool = True
    first_image: int = 0
    tau: float = 1.0
    eps: float = 1.0
    return_assignment: str = "none"  # "none", "soft" or "used": the map that the kernel writes


class Appending(NamedTuple):
    """Settings of ``ops.mix_tokens`` and ``ops.restore_tokens``, which append a branch."""

    group_size: int
    keep: bool  # whether the last branch stays, in front of the new one
    mean: bool  # whether the new group tokens are the mixing group's mean


class Blending(NamedTuple):
    """Settings of ``ops.blend_tokens``."""

    group_size: int
    alpha: float
    adjoint: bool = False  # the gradient of the input from that of the output


class LogitBlock(NamedTuple):
    """A block of the contrastive loss's logits, rows by columns, and whether both sides want a gradient.

    Row r belongs to sample ``(first_row + r) // row_prompts``, column c to sample ``c // column_prompts``.
    """

    row_prompts: int
    column_prompts: int
    first_row: int
    both: bool
