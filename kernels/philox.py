"""Gumbel noise on the device: the numbers of ops/philox.py, drawn where they are used."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .variants import INTERPRET

_INTERPRET: tl.constexpr = tl.constexpr(INTERPRET)


@triton.jit
def _log(x):
    """The hardware's logarithm: to 2**-22 of the result or absolutely, whichever is more."""
    return tl.log(x) if _INTERPRET else libdevice.fast_logf(x)


@triton.jit
def _minus_log(uniform):
    """``-log(uniform)`` to a relative 1e-6: near 1, where the hardware's logarithm has only absolute accuracy and the
    largest noise comes from, by its series."""
    rest = 1.0 - uniform  # exact
    series = 1 / 7 + rest * (1 / 8)
    for denominator in tl.static_range(6, 0, -1):
        series = 1.0 / denominator + rest * series
    return tl.where(rest < 0.125, rest * series, -_log(uniform))


@triton.jit
def gumbel_noise(seed, image, patch, QUADS: tl.constexpr):
    """Standard Gumbel noise fp32 ``[P, 4 * QUADS]`` for patches ``patch [P]`` (int32) of `image` (int64).

    One Philox call under the key `seed` (int64) and the counter (patch, quad, image's low and high half) gives the
    noise of four consecutive groups, one from each of its four numbers. Column ``lane * QUADS + quad`` belongs to
    group ``4 * quad + lane``: every number's columns lie together, so that in the layout of a matrix product's result
    a thread needs all four numbers of the calls that it makes.
    """
    quad = tl.arange(0, QUADS)[None, :]
    low, high = image.to(tl.int32), (image >> 32).to(tl.int32)
    lane0, lane1, lane2, lane3 = tl.philox(seed, patch[:, None], quad, low, high)
    bits = tl.join(tl.join(lane0, lane1), tl.join(lane2, lane3))  # [P, QUADS, lane % 2, lane // 2]
    bits = tl.reshape(tl.permute(bits, (0, 3, 2, 1)), (patch.shape[0], 4 * QUADS))
    # The middle of one of 2**23 cells: exact in fp32, never 0 or 1, so the noise is finite.
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 2.0**-23
    return -_log(_minus_log(uniform))
