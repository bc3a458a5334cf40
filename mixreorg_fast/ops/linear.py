"""``x @ weight.T + bias`` through the faster of a CPU's two matrix libraries."""

from __future__ import annotations

from functools import cache
from timeit import timeit
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from .dispatch import choose

LinearImpl = Literal["auto", "onednn", "torch"]

# What `onednn_wins` measures: rows, channels in and out, and how often. About 20 ms in all.
ROWS, CHANNELS, OUT, REPEATS = 512, 384, 384, 7
# The least gain for which oneDNN is taken. Where the libraries are about equal, every process keeps PyTorch's.
GAIN = 1.1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: LinearImpl = "auto") -> Tensor:
    """``torch.nn.functional.linear``, of the same precision.

    PyTorch calls Intel's MKL in fp32. On some processors of other vendors oneDNN takes half its time, on others more
    (benchmarks/test_linear.py). So "auto" measures both at the first call of a process, for each number of threads.
    Each library gives the same bits in every call, but the two round differently. The choice may differ between ranks,
    and between a run and its continuation in another process; force `impl` where that matters.

    Args:
        x: ``[..., C]``. weight: ``[O, C]``. bias: ``[O]``. All of one floating dtype.
        impl: "torch": PyTorch's own choice; "onednn": oneDNN, of fp32 tensors on a CPU; "auto": oneDNN where it is
            measured faster (`onednn_wins`).
    Returns:
        ``[..., O]``. Differentiable, once.
    Raises:
        RuntimeError: `impl` cannot run here.
    """
    candidate = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if impl == "auto" and not candidate:  # the common case, before anything is listed
        return F.linear(x, weight, bias)
    reasons = {"onednn": lambda: _onednn_reasons(x, weight, impl), "torch": list}
    if choose("linear", impl, reasons, (x, weight)) == "onednn":
        return _OneDnn.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


@cache
def onednn_wins(threads: int) -> bool:
    """Whether oneDNN computes a product of a usual size faster than PyTorch's library by `GAIN`, with so many threads:
    the best of `REPEATS` of each, taken in turns."""
    # Constants leave the caller's random numbers alone. Modes would count the products, or fake them.
    with torch.no_grad(), _disable_current_modes():
        x, weight = (torch.ones(n, CHANNELS, dtype=torch.float32, device="cpu") for n in (ROWS, OUT))
        products = (lambda: F.linear(x, weight), lambda: _product(x, weight))
        rounds = [[timeit(product, number=1) for product in products] for _ in range(1 + REPEATS)]
    usual, onednn = map(min, zip(*rounds, strict=True))
    return usual > GAIN * onednn


def _onednn_reasons(x: Tensor, weight: Tensor, impl: LinearImpl) -> list[str]:
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"tensors on {x.device}, oneDNN computes on a CPU only")
    elif torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on")
    if not x.dtype == weight.dtype == torch.float32:
        reasons.append(f"dtypes {x.dtype} and {weight.dtype}, expected float32")
    if torch.compiler.is_compiling():
        reasons.append("torch.compile chooses by itself")
    if not x.numel():
        reasons.append("no elements")
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        reasons.append(f"PyTorch {torch.__version__} comes without it")
    if impl == "auto" and not reasons and not onednn_wins(torch.get_num_threads()):
        reasons.append("it is not faster here")
    return reasons


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of matrices of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnn(torch.autograd.Function):
    """``x @ weight.T + bias`` for ``x [M, C]``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if for_x else None,
            _product(grad.t(), x.t()) if for_weight else None,  # [O, C] <- [O, M] @ [M, C]
            grad.sum(0) if for_bias else None,
        )
