"""Which implementation an op runs, and the reasons against each."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import variants

log = logging.getLogger("mixreorg_fast")

Impl = Literal["auto", "triton", "torch"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class UnknownImplementation(ValueError):
    """`impl` is not among the op's implementations, which `known` lists."""

    def __init__(self, op: str, impl: str, known: Iterable[str]) -> None:
        self.known = tuple(known)
        super().__init__(f"{op}: impl must be 'auto' or one of {', '.join(map(repr, self.known))}, got {impl!r}")


class CannotRun(RuntimeError):
    """A forced implementation cannot run on its inputs; `reasons` lists why."""

    def __init__(self, message: str, reasons: Sequence[str]) -> None:
        super().__init__(f"{message}: {'; '.join(reasons)}")
        self.reasons = list(reasons)


def triton_reasons(*tensors: Tensor) -> list[str]:
    """Why a Triton kernel cannot take these tensors; of integer tensors only the device matters."""
    device = tensors[0].device
    fits = (x.device == device and (x.dtype in FLOATS or not x.is_floating_point()) for x in tensors)
    if TRITON_INSTALLED and variants.launches_on(device) and variants.architecture(device) >= 80 and all(fits):
        return []  # the common case, before any text is made
    if not TRITON_INSTALLED:
        return ["Triton is not installed"]
    reasons = []
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        reasons.append(f"tensors on several devices ({', '.join(devices)})")
    elif not variants.launches_on(device):
        reasons.append(f"tensors on {devices[0]}, Triton needs CUDA")
    elif variants.architecture(device) < 80:
        reasons.append("compute capability below 8.0")
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors if tensor.is_floating_point()):
        if dtype not in FLOATS:
            reasons.append(f"dtype {dtype}, expected float32, bfloat16 or float16")
    return reasons


def choose(op: str, impl: str, reasons: Mapping[str, Callable[[], list[str]]], inputs: Sequence[Tensor] = ()) -> str:
    """The name of the implementation to run.

    `reasons` maps each implementation, fastest first, to a function that lists why it cannot run on `inputs`.
    "auto" takes the first one without reasons; a forced one with reasons raises.

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
        problems = (passed_over(op, inputs) if name == "triton" else []) or not_supported_reasons()
        if not problems:
            return name
        refusals.append(f"{name}: {'; '.join(problems)}")
    raise CannotRun(f"{op}: no implementation can run on {describe(inputs)}", refusals)


def uses_triton(op: str, impl: str, *inputs: Tensor | None, limits: Callable[[], list[str]] = list) -> bool:
    """Whether an op of the two implementations "triton" and "torch" runs its kernel.

    `limits` lists why the kernel cannot take inputs of these sizes. Raises what :func:`choose` raises.
    """
    tensors = [x for x in inputs if x is not None]
    reasons = {"triton": lambda: [*triton_reasons(*tensors), *limits()], "torch": list}
    return choose(op, impl, reasons, tensors) == "triton"


def passed_over(op: str, inputs: Sequence[Tensor]) -> list[str]:
    """Why "auto" does not take a kernel that might run: Triton's interpreter is slow, or a launch has failed."""
    if not all(_on_gpu(tensor) for tensor in inputs):
        return ["tensors not on CUDA"]
    failure = _without_resources.get((op, inputs[0].device))
    return [failure] if failure else []


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda or tensor.is_meta  # meta: while compiling offline


_without_resources: dict[tuple[str, torch.device], str] = {}  # kernels that "auto" no longer takes, and why
_tried: set[Hashable] = set()  # kernels whose backward has run


def falls_back(op: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a public op: if a launch needs more than the device has, "auto" takes the next implementation.

    This can happen on GPUs and for shapes that no configuration is checked for; Triton raises before it launches.
    Backward cannot choose another implementation, so its kernels run once right after the first forward of each shape.
    """
    name = op.__qualname__

    @functools.wraps(op)
    def call(*inputs: Any, impl: str = "auto", **settings: Any) -> Any:
        try:
            out = op(*inputs, impl=impl, **settings)
            if impl == "auto" and not torch.compiler.is_compiling():
                _try_backward(op, out, inputs, settings)
            return out
        except Exception as error:
            if not _is_out_of_resources(error):
                raise
            tensors = [x for x in (*inputs, *settings.values()) if isinstance(x, Tensor)]
            if impl != "auto":
                raise CannotRun(f"{name}: impl='{impl}' cannot run on {describe(tensors)}", [str(error)]) from error
            device = tensors[0].device
            _without_resources[name, device] = str(error)
            log.warning("%s: the kernel cannot run on %s, PyTorch takes over: %s", name, device, error)
        return op(*inputs, impl=impl, **settings)

    return call


def _try_backward(op: Callable[..., Any], out: Any, inputs: Sequence[Any], settings: Mapping[str, Any]) -> None:
    outputs = _differentiable(out)
    if not outputs or not _on_gpu(outputs[0]) or variants.offline_architecture is not None:
        return
    given = (*inputs, *settings.values())
    tensors = [(x.device, x.dtype, x.shape[1:]) for x in (*outputs, *given) if isinstance(x, Tensor)]
    modes = [x for x in settings.values() if isinstance(x, str | bool)]
    sizes = [x.group_size for x in given if hasattr(x, "group_size")]  # of a MixPlan
    key = (op.__qualname__, *tensors, *modes, *sizes)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if key in _tried or hooks:  # checkpointing would recompute
        return
    _tried.add(key)

    # Of this op alone: one input may be computed from another, with a network and ZeRO-3's hooks in between.
    def alone(x: Any) -> Any:
        return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    inputs, settings = [alone(x) for x in inputs], {name: alone(x) for name, x in settings.items()}
    if leaves := [x for x in (*inputs, *settings.values()) if isinstance(x, Tensor) and x.requires_grad]:
        outputs = _differentiable(op(*inputs, **settings))
        torch.autograd.grad(outputs, leaves, [torch.zeros_like(x) for x in outputs], allow_unused=True)


def _differentiable(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if type(x) is Tensor and x.requires_grad]


def _is_out_of_resources(error: Exception) -> bool:
    triton = sys.modules.get("triton")
    return triton is not None and isinstance(error, triton.runtime.errors.OutOfResources)


def describe(inputs: Sequence[Tensor]) -> str:
    """``"bfloat16 [2, 3] on cuda:0, …"``, for error messages."""
    texts = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}" for x in inputs]
    return ", ".join(texts) or "these inputs"


def scale_tensor(logit_scale: Tensor | float, device: torch.device) -> Tensor:
    """`logit_scale` as a 0-d tensor on `device`, fp32 (fp64 if it was), differentiable."""
    if isinstance(logit_scale, Tensor):
        return logit_scale.to(device, torch.promote_types(logit_scale.dtype, torch.float32)).reshape(())
    return torch.full((), logit_scale, dtype=torch.float32, device=device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in its dtype, as PyTorch's matmuls take them; else unchanged. fp64 stays.

    For ops made of matmuls. Ops that only move data keep their inputs' dtype.
    """
    if not _autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(dtype) if tensor.dtype in FLOATS else tensor for tensor in tensors)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast switched off on the device of `tensor`; a null context where it is off already."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else contextlib.nullcontext()


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # raises for meta tensors
