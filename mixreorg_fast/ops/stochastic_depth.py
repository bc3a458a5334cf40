"""Stochastic depth (Huang et al., ECCV 2016): which images skip which residual, drawn for a whole network at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import upload
from .dispatch import Impl, uses_triton
from .philox import philox, seed_tensor
from .registration import kernel


def stochastic_depth(
    seed: int | Tensor,
    rates: Sequence[float],
    images: int,
    *,
    branches: int = 1,
    first_image: int = 0,
    device: torch.device | str | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The factor of each residual: 0 where it is dropped, else 1 / (the probability that it is kept).

    Args:
        seed: int or 0-d int64 tensor. A number is a pure function of (seed, first_image + image, branch, block).
        rates: probability of each block's residuals to be dropped, in [0, 1).
        images, branches: rows of a block are images of one branch after the other.
        device: that of `seed` unless given, else the CPU.
    Returns:
        fp32 ``[2, len(rates), branches * images]``, the same from every `impl`: a block has two residuals.
    Raises:
        ValueError: a rate outside [0, 1). RuntimeError: `impl` cannot run there.
    """
    rates = list(rates)
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"stochastic_depth: rates must lie in [0, 1), got {rates}")
    seed = seed_tensor(seed, device)
    draw = _stochastic_depth if uses_triton("stochastic_depth", impl, seed) else stochastic_depth_reference
    return draw(seed, rates, images, branches, first_image)


def stochastic_depth_reference(
    seed: Tensor, rates: list[float], images: int, branches: int, first_image: int
) -> Tensor:
    """The counter (image, branch, block, 0) gives the uniform numbers of both residuals: kept from the rate on."""
    image = torch.arange(images, device=seed.device) + first_image
    branch = torch.arange(branches, device=seed.device)[:, None]
    block = torch.arange(len(rates), device=seed.device)[:, None, None]
    bits = torch.stack(philox(seed, image, branch, block, torch.zeros_like(image))[:2]).flatten(2)
    rate = upload(torch.tensor(rates, dtype=torch.float64), seed.device)[:, None]
    return (bits.double() * 2.0**-32 >= rate).float() / (1 - rate).float()


@kernel("stochastic_depth.stochastic_depth")
def _stochastic_depth(seed: Tensor, rates: list[float], images: int, branches: int, first_image: int) -> Tensor:
    return seed.new_empty((2, len(rates), branches * images), dtype=torch.float32)
