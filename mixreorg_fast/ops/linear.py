"""``x @ weight.T + bias`` through the faster of a CPU's two matrix libraries."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose

LinearImpl = Literal["auto", "onednn", "torch"]

# Processors, as (vendor, instruction set), on which oneDNN was measured faster in fp32 than PyTorch's choice
# (benchmarks/test_linear.py). PyTorch calls Intel's MKL, which uses no AVX-512 on other vendors' processors.
ONEDNN_WINS = {("AuthenticAMD", "AVX512")}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: LinearImpl = "auto") -> Tensor:
    """``torch.nn.functional.linear``, of the same precision.

    Args:
        x: ``[..., C]``. weight: ``[O, C]``. bias: ``[O]``. All of one floating dtype.
        impl: "torch": PyTorch's own choice; "onednn": oneDNN, of fp32 tensors on a CPU; "auto": oneDNN where it was
            measured faster (`ONEDNN_WINS`).
    Returns:
        ``[..., O]``. Deterministic; differentiable, once.
    Raises:
        RuntimeError: `impl` cannot run here.
    """
    candidate = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if impl == "auto" and not (candidate and onednn_wins()):
        return F.linear(x, weight, bias)
    reasons = {"onednn": lambda: _onednn_reasons(x, weight), "torch": list}
    if choose("linear", impl, reasons, (x, weight)) == "onednn":
        return _OneDnn.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


@cache
def onednn_wins() -> bool:
    """Whether this machine's processor is among `ONEDNN_WINS`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    return (vendor, torch.backends.cpu.get_cpu_capability()) in ONEDNN_WINS


def _onednn_reasons(x: Tensor, weight: Tensor) -> list[str]:
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"tensors on {x.device}, it computes on a CPU")
    if not x.dtype == weight.dtype == torch.float32:
        reasons.append(f"dtypes {x.dtype} and {weight.dtype}, expected float32")
    if torch.is_autocast_enabled(x.device.type):
        reasons.append("autocast is on")
    if torch.compiler.is_compiling():
        reasons.append("torch.compile chooses by itself")
    if not x.numel():
        reasons.append("no elements")
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        reasons.append(f"PyTorch {torch.__version__} comes without it")
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
