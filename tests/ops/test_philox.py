"""Counter-based random numbers: the published known answers, and the noise made of them."""

from __future__ import annotations

import math

import pytest
import torch

from mixreorg_fast.ops.philox import gumbel, philox, seed_tensor

# Random123's known answers for Philox4x32-10: counter, key (low, high), result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_known_answers(counter, key, answer, as_tensor, device):
    low, high = words(key)
    seed = low | high << 32
    if as_tensor:
        seed = seed_tensor(seed, device)
    numbers = philox(seed, *(torch.tensor(word, device=device) for word in words(counter)))
    assert [int(number) for number in numbers] == words(answer)


def test_seed_tensor_keeps_the_64_bits(device):
    for seed in (0, -1, 2**63 + 5, 2**64 - 1, -(2**63)):
        tensor = seed_tensor(seed, device)
        assert tensor.dtype == torch.int64
        assert tensor.shape == ()
        assert (int(tensor) - seed) % 2**64 == 0
    assert torch.equal(seed_tensor(torch.tensor([7], dtype=torch.int32), device), torch.tensor(7, device=device))


def test_gumbel_noise_is_finite_and_gumbel(device):
    extremes = gumbel(torch.tensor([0, 2**32 - 1], device=device))
    assert extremes.isfinite().all()
    counter = torch.arange(50_000, device=device)
    zero = torch.zeros_like(counter)
    noise = gumbel(torch.cat(philox(11, counter, zero, zero, zero))).double()
    assert abs(noise.mean() - 0.5772) < 0.015  # 5 standard errors
    assert abs(noise.var() - math.pi**2 / 6) < 0.05
