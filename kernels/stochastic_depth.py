"""Stochastic depth: the factors of all residuals of a network, drawn in one launch."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import cdiv

BLOCK = 256


@triton.jit(do_not_specialize=["first_image"])
def _stochastic_depth_kernel(
    seed_ptr, thresholds_ptr, scales_ptr, out_ptr, images, branches, first_image, total, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    block = index // (branches * images)
    threshold = tl.load(thresholds_ptr + block, mask=mask, other=0)
    scale = tl.load(scales_ptr + block, mask=mask, other=0.0)
    image = (index % images + first_image).to(tl.int32)
    bits0, bits1, _, _ = tl.philox(tl.load(seed_ptr), image, index // images % branches, block, tl.zeros_like(block))
    tl.store(out_ptr + index, tl.where(bits0.to(tl.int64) >= threshold, scale, 0.0), mask=mask)
    tl.store(out_ptr + total + index, tl.where(bits1.to(tl.int64) >= threshold, scale, 0.0), mask=mask)


@functools.lru_cache(maxsize=16)
def _tables(rates: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each rate's threshold: the least of 2**32 numbers that keeps a residual (int64, exact); and the factor of what is
    kept (fp32)."""
    thresholds = torch.tensor([math.ceil(rate * 2.0**32) for rate in rates])
    scales = 1 / torch.tensor([1 - rate for rate in rates])
    return thresholds.to(device), scales.to(device)


def stochastic_depth(
    seed: Tensor, rates: list[float], images: int, branches: int, first_image: int, out: Tensor
) -> None:
    """Fill `out` ``[2, blocks, branches * images]`` under the key `seed` (0-d int64, read on the device)."""
    total = out[0].numel()
    if total:
        thresholds, scales = _tables(tuple(rates), seed.device)
        _stochastic_depth_kernel[(cdiv(total, BLOCK),)](
            seed, thresholds, scales, out, images, branches, first_image, total, BLOCK=BLOCK, num_warps=4
        )
