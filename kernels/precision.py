"""Arithmetic that is the same interpreted and compiled.

Triton's interpreter cannot multiply bf16, and converts to bf16 by truncation. So interpreted kernels compute in fp32,
also for 16-bit tensors, and these functions round where a GPU does: to the nearest, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .variants import INTERPRET

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def upcast(x):
    """`x` as an operand of a product: as it is; in fp32 when interpreted."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x`, fp32 or `dtype`, in `dtype`."""
    if INTERPRETED and x.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """`x`, fp32 or `dtype`, as an operand of a product with tensors of `dtype`: rounded to it."""
    return upcast(rounded(x, dtype))


@triton.jit
def log2(x):
    """The hardware's logarithm; its error is at most 2**-22, relative or absolute, whichever is larger."""
    return tl.log2(x) if INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def exp2(x):
    """The hardware's exponential, 0 where it would be subnormal: one instruction."""
    return tl.exp2(x) if INTERPRETED else libdevice.exp2(x)


@triton.jit
def reciprocal(x):
    """``1 / x`` to two units in the last place, for ``|x| < 2**126``: a sixth of a division's instructions."""
    return 1.0 / x if INTERPRETED else libdevice.fast_dividef(1.0, x)
