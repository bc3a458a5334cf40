"""Stochastic depth: the same draws from both implementations, on any number of ranks, at the asked rates."""

from __future__ import annotations

import pytest
import torch

from mixreorg_fast import ops
from mixreorg_fast.ops.philox import philox

RATES = [0.0, 1 / 3, 0.5, 2.0**-32, 0.9]  # never; no binary fraction; one; the smallest that drops; most


@pytest.mark.parametrize(
    ("seed", "images", "branches", "first_image"),
    [(3, 7, 3, 0), (-(2**40) - 1, 65, 1, 2**31 + 5), (5, 1, 2, 1), (5, 0, 2, 0)],  # no multiples of a block
)
def test_both_implementations_draw_the_same(seed, images, branches, first_image, device, poisoned_memory):
    seed = torch.tensor(seed, device=device)
    expected, got = (
        ops.stochastic_depth(seed, RATES, images, branches=branches, first_image=first_image, impl=impl)
        for impl in ("torch", "triton")
    )
    assert got.shape == (2, len(RATES), branches * images) and got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_number_on_the_threshold_is_kept(impl, device):
    """The comparison is exact: a rate equal to a drawn number keeps it, the next larger double drops it."""
    zero = torch.tensor(0)
    bits = philox(9, zero, zero, zero, zero)[0]
    rate = float(bits) * 2.0**-32
    above = float(torch.nextafter(torch.tensor(rate, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)))
    first = lambda rate: ops.stochastic_depth(9, [rate], 1, device=device, impl=impl)[0, 0, 0].cpu()  # noqa: E731
    assert torch.equal(first(rate), torch.ones(()) / (1 - rate))
    assert first(above) == 0


def test_draws_depend_on_the_global_image_alone(device):
    whole = ops.stochastic_depth(9, RATES, 12, branches=2, device=device).unflatten(2, (2, 12))
    part = ops.stochastic_depth(9, RATES, 6, branches=2, first_image=6, device=device).unflatten(2, (2, 6))
    assert torch.equal(part, whole[..., 6:])
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])
    assert not torch.equal(whole, ops.stochastic_depth(10, RATES, 12, branches=2, device=device).unflatten(2, (2, 12)))


def test_residuals_are_dropped_at_their_rates_and_unbiased(device):
    factors = ops.stochastic_depth(1, RATES, 20_000, device=device)
    dropped = (factors == 0).double().mean(2)
    torch.testing.assert_close(dropped, torch.tensor([RATES] * 2, device=device).double(), rtol=0, atol=0.015)
    torch.testing.assert_close(factors.mean(2), torch.ones_like(factors[..., 0]), rtol=0, atol=0.1)


def test_rates_that_are_no_probabilities_are_refused():
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"stochastic_depth: rates must lie in \[0, 1\), got"):
            ops.stochastic_depth(0, [0.1, rate], 2)


def test_registration_passes_opcheck(device):
    torch.library.opcheck(
        torch.ops.mixreorg.stochastic_depth.default, (torch.tensor(3, device=device), [0.1, 0.2], 2, 3, 1)
    )
