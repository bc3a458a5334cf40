"""Rounding to 16 bits in kernels, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from mixreorg_fast.kernels.precision import operand, rounded  # noqa: E402


@triton.jit
def _round(x_ptr, rounded_ptr, operand_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x = tl.load(x_ptr + place)
    dtype: tl.constexpr = rounded_ptr.dtype.element_ty
    tl.store(rounded_ptr + place, rounded(x, dtype))
    tl.store(operand_ptr + place, operand(x, dtype).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_the_nearest_ties_to_even(dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    x = 4 * torch.randn(256, device=device, generator=generator)
    x[:64] = (x[:64].bfloat16().view(torch.int16).int() << 16 | 0x8000).view(torch.float32)  # halfway in bf16
    x[64:70] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8])
    out, wide = torch.empty(256, dtype=dtype, device=device), torch.empty(256, device=device)
    _round[(1,)](x, out, wide, SIZE=256)
    assert torch.equal(out.nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
    assert torch.equal(wide.nan_to_num(7.0), out.float().nan_to_num(7.0))
    assert torch.equal(out.isnan(), x.isnan())
