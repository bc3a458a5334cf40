"""Which implementation an op runs: capability as data, refusal with reasons."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..kernels import variants

Impl = Literal["auto", "triton", "torch"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Where the ledger (docs/performance.md) shows PyTorch ahead of the kernel: op -> whether these inputs are such a case.
PYTORCH_WINS: dict[str, Callable[..., bool]] = {}


class UnknownImplementation(ValueError):
    """`impl` names none of the op's implementations, which `known` lists."""

    def __init__(self, op: str, impl: str, known: Iterable[str]) -> None:
        self.known = tuple(known)
        super().__init__(f"{op}: impl must be 'auto' or one of {', '.join(map(repr, self.known))}, got {impl!r}")


class CannotRun(RuntimeError):
    """A forced implementation cannot run on its inputs; `reasons` lists why."""

    def __init__(self, message: str, reasons: Sequence[str]) -> None:
        super().__init__(f"{message}: {'; '.join(reasons)}")
        self.reasons = list(reasons)


def triton_reasons(*tensors: Tensor) -> list[str]:
    """Why a Triton kernel cannot take these tensors; integer tensors are only asked for their device."""
    if not TRITON_INSTALLED:
        return ["Triton is not installed"]
    reasons = []
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        reasons.append(f"tensors on several devices ({', '.join(devices)})")
    elif not variants.launches_on(tensors[0].device):
        reasons.append(f"tensors on {devices[0]}, Triton needs CUDA")
    elif tensors[0].is_cuda and torch.cuda.get_device_properties(tensors[0].device).major < 8:
        reasons.append("compute capability below 8.0")
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors if tensor.is_floating_point()):
        if dtype not in FLOATS:
            reasons.append(f"dtype {dtype}, expected float32, bfloat16 or float16")
    return reasons


def choose(op: str, impl: str, reasons: Mapping[str, Callable[[], list[str]]], inputs: Sequence[Tensor] = ()) -> str:
    """The name of the implementation to run.

    `reasons` maps each implementation, fastest first, to a function that lists why it cannot run on `inputs`.
    With "auto" the first one without reasons is taken; a forced one that has reasons raises.

    Raises:
        UnknownImplementation: `impl` is no implementation of this op.
        CannotRun: the forced implementation (or, with "auto", every one) cannot run; every reason is listed.
    """
    if impl != "auto":
        if impl not in reasons:
            raise UnknownImplementation(op, impl, reasons)
        problems = reasons[impl]()
        if problems:
            raise CannotRun(f"{op}: impl='{impl}' cannot run on {describe(inputs)}", problems)
        return impl
    refusals = []
    for name, not_supported_reasons in reasons.items():
        problems = (_passed_over(op, inputs) if name == "triton" else []) or not_supported_reasons()
        if not problems:
            return name
        refusals.append(f"{name}: {'; '.join(problems)}")
    raise CannotRun(f"{op}: no implementation can run on {describe(inputs)}", refusals)


def _passed_over(op: str, inputs: Sequence[Tensor]) -> list[str]:
    """Why "auto" passes the kernel by, whether or not it could run."""
    if not all(tensor.is_cuda or tensor.is_meta for tensor in inputs):
        return ["tensors not on CUDA"]
    if op in PYTORCH_WINS and PYTORCH_WINS[op](*inputs):
        return ["measured slower than PyTorch on such inputs"]
    return []


def describe(inputs: Sequence[Tensor]) -> str:
    """``"bfloat16 [2, 3] on cuda:0, …"``, for error messages."""
    texts = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}" for x in inputs]
    return ", ".join(texts) or "these inputs"


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in its dtype, as PyTorch's own matrix products take them; else unchanged.

    For ops that are matrix products at heart. Ops that only move data keep their inputs' dtype.
    """
    if not _autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast switched off on the device of `tensor`; entering costs nothing where it is off already."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else contextlib.nullcontext()


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which does not know meta tensors
