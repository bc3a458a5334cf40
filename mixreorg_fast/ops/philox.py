"""Counter-based random numbers (Philox4x32-10) in plain PyTorch: the same bits as the kernels draw.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of its counter and
key, so noise is never stored: backward, another rank or another implementation draws the same numbers again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def seed_tensor(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """`seed` as a 0-d int64 tensor, as kernels read it; an int's 64 bits, without synchronising.

    `device` defaults to that of `seed`, else the CPU.
    """
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).reshape(())
    if not -(2**63) <= seed < 2**63:  # a seed that torch.compile holds symbolic is an int64, and must not overflow
        seed = (seed + 2**63) % 2**64 - 2**63
    return (_opaque_fill if torch.compiler.is_compiling() else _fill)(seed, torch.device(device or "cpu"))


def _fill(seed: int, device: torch.device) -> Tensor:
    return torch.full((), seed, dtype=torch.int64, device=device)


# Inductor copies values computed without reading memory, such as constants, into each of their uses. Every round of
# Philox uses its numbers several times: with a constant key the code would grow exponentially. The
# result of a custom op is read from memory.
_opaque_fill = torch.library.custom_op("mixreorg::seed", _fill, mutates_args=())
_opaque_fill.register_fake(_fill)


def philox(seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uint32 numbers for each counter ``(c0, c1, c2, c3)`` under the 64-bit key `seed`.

    Counters are int64 tensors in ``[0, 2**32)`` that broadcast against one another; `seed` is an int or a 0-d int64
    tensor (read where it lives, no synchronisation). Results are int64 tensors in ``[0, 2**32)``.
    """
    seed = seed_tensor(seed, c0.device)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def draws(
    seed: int | Tensor, first: int, images: int, rows: int, columns: int, device: torch.device | None = None
) -> Tensor:
    """Uint32 numbers ``[images, rows, columns]``, a pure function of (seed, first + image, row, column).

    One Philox call with the counter (column, quad, image's low and high half) gives rows ``4 * quad .. 4 * quad + 3``.
    """
    image = first + torch.arange(images, device=device)[:, None, None]
    quad = torch.arange((rows + 3) // 4, device=device)[:, None]
    column = torch.arange(columns, device=device)
    lanes = torch.stack(philox(seed, column, quad, image & _MASK, image >> 32), dim=2)  # [images, quads, 4, columns]
    return lanes.flatten(1, 2)[:, :rows]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two uint32 numbers, without int64 overflow."""
    a_high, a_low = a >> 16, a & 0xFFFF
    low = a_low * b  # < 2**48
    high = a_high * b + (low >> 16)  # < 2**49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise (fp32) from uint32 numbers.

    The uniform is taken at the middle of one of 2**23 cells, exact in fp32: never 0 or 1. So noise is in -2.8 to 16.6.
    """
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
