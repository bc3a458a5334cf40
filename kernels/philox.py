"""Gumbel noise on the device: the numbers of ops/philox.py, drawn where they are used."""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import INTERPRETED, log2


@triton.jit
def _minus_log2(uniform):
    """``-log2(uniform)`` to a relative 1.3e-6.

    The largest noise comes from numbers near 1, where the hardware's logarithm has only absolute accuracy. A minimax
    polynomial (relative error 1.4e-8) replaces it there.
    """
    rest = 1.0 - uniform  # exact
    series = 0.35014464 + rest * 0.37924017
    series = 0.4813824 + rest * series
    series = 0.72133983 + rest * series
    series = 1.44269506 + rest * series
    return tl.where(rest < 0.125, rest * series, -log2(uniform))


@triton.jit
def _wide_product(a, b):
    """Low and high half of the product of two uint32 numbers, from one multiplication."""
    if INTERPRETED:
        return a * b, tl.umulhi(a, b)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$0, $1}, product; }",
            "=r,=r,r,r",
            [a, b],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _philox(seed, c0, c1, c2, c3):
    """Philox4x32-10: four uint32 numbers for each counter. Triton's own takes two multiplications for each product."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = _wide_product(c0, tl.full((), 0xD2511F53, tl.uint32))
        low2, high2 = _wide_product(c2, tl.full((), 0xCD9E8D57, tl.uint32))
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel_noise(seed, image, patch, scale, QUADS: tl.constexpr):
    """Gumbel noise times `scale`, fp32 ``[P, 4 * QUADS]``, for patches ``patch [P]`` (int32) of `image` (int64).

    The noise is in units of log(2) and differs from standard noise by a constant, which cancels in softmax and arg-max:
    that saves two factors per number.

    One Philox call under the key `seed` (int64) and the counter (patch, quad, image's low and high half) gives the
    noise of four consecutive groups, one from each of its four numbers. Column ``lane * QUADS + quad`` belongs to
    group ``4 * quad + lane``: the columns of a number are adjacent, so that in the layout of a matmul's result a thread
    needs all four numbers of each of its calls.
    """
    # As wide as the results: otherwise the first rounds get another layout, followed by a conversion.
    row = tl.broadcast_to(patch.to(tl.uint32)[:, None], (patch.shape[0], QUADS))
    quad = tl.broadcast_to(tl.arange(0, QUADS).to(tl.uint32)[None, :], (patch.shape[0], QUADS))
    lane0, lane1, lane2, lane3 = _philox(seed, row, quad, image.to(tl.uint32), (image >> 32).to(tl.uint32))
    bits = tl.join(tl.join(lane0, lane1), tl.join(lane2, lane3))  # [P, QUADS, lane % 2, lane // 2]
    bits = tl.reshape(tl.permute(bits, (0, 3, 2, 1)), (patch.shape[0], 4 * QUADS))
    # The middle of one of 2**23 cells: exact in fp32, never 0 or 1, so the noise is finite.
    uniform = (bits >> 9).to(tl.float32) * 2.0**-23 + 2.0**-24
    return -scale * log2(_minus_log2(uniform))
