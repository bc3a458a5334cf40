"""The error budget of every kernel: against the truth in fp64, relative to what PyTorch reaches in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# By how much a kernel's error may exceed PyTorch's: a few roundings in fp32 (sums in another order), else one rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def relative_error(result: Tensor, truth: Tensor) -> Tensor:
    """``|result - truth| / (|truth| + rms(truth))``: relative for large elements, to the tensor's scale for small."""
    truth = truth.double()
    scale = truth.abs() + truth.square().mean().sqrt()
    error = (result.double() - truth).abs()
    return torch.where(error == 0, 0.0, error / scale)  # all-zero truths have no scale


def assert_close_to_truth(
    result: Tensor, baseline: Tensor, truth: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """Require ``error(result) <= error(baseline) + tolerance``, both against `truth`, over their worst elements.

    Args:
        result: of the kernel; baseline: of PyTorch in the same dtype; truth: of the reference in fp64.
        dtype: the inputs' dtype, whose row of TOLERANCE holds unless `tolerance` is given.
    """
    assert result.shape == baseline.shape == truth.shape, f"{result.shape}, {baseline.shape}, {truth.shape}"
    if truth.numel() == 0:
        return
    error = relative_error(result, truth)
    error = torch.where(error.isnan(), torch.inf, error)
    bound = relative_error(baseline, truth).max() + (TOLERANCE[dtype] if tolerance is None else tolerance)
    worst = int(error.argmax())
    if not error.flatten()[worst] <= bound:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"error {float(error.flatten()[worst]):.3g} exceeds {float(bound):.3g} at {index}: "
            f"got {float(result[index])!r}, truth {float(truth[index])!r}, PyTorch {float(baseline[index])!r}"
        )
