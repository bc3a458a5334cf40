"""The device that a process computes on and its NVIDIA driver."""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RankError, UserError
from .ranks import local_rank

# The oldest driver that runs programs of a CUDA major version.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_NVML_DRIVER_NOT_LOADED = 9


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver as its management library (NVML) describes it."""

    version: str  # such as "580.65.06", or "unknown"
    gpus: int  # of this machine, those that CUDA_VISIBLE_DEVICES hides included
    problem: str | None = None  # what NVML reports instead of a version

    def __str__(self) -> str:
        return f"driver {self.version}"


def driver() -> Driver | None:
    """The driver of this machine; None without a driver or without a GPU.

    NVML answers also where CUDA does not, as with a driver that is too old for PyTorch. A container that was given no
    GPU has no NVML, though its /proc shows the host's driver.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        code = nvml.nvmlInit_v2()
    except (OSError, AttributeError):
        return None
    if code == _NVML_DRIVER_NOT_LOADED:
        return None
    if code:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        return Driver("unknown", 1, (nvml.nvmlErrorString(code) or b"unknown error").decode())
    version, count = ctypes.create_string_buffer(80), ctypes.c_uint()
    nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return Driver(version.value.decode() or "unknown", count.value) if count.value else None


def cuda_problem() -> str | None:
    """Why PyTorch cannot use this machine's GPUs; None: it can, there are none, or the environment hides them."""
    if hidden() or cuda_available() or (found := driver()) is None:
        return None
    gpus = f"{found.gpus} NVIDIA GPU{'s' * (found.gpus > 1)}"
    there = f"this machine has {gpus} ({found}), but PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{there} is built without CUDA: install a build with CUDA"
    needed = OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    major = found.version.partition(".")[0]
    if major.isdigit() and int(major) < needed:
        older = ", or install PyTorch for CUDA 12: make env CUDA=12 (docs/install.md)"
        advice = f"update the driver{older if int(major) >= OLDEST_DRIVER[12] else ''}"
        return f"{there} for CUDA {torch.version.cuda} needs driver {needed} or newer: {advice}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    selection = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
    return f"{there} cannot use them: {found.problem or 'see nvidia-smi'}{selection}"


def choose(name: str | None = None) -> torch.device:
    """The device to compute on, with its number if it is a GPU.

    Args:
        name: "cpu", "cuda" (the GPU of this rank), "cuda:1" and whatever else PyTorch names; None: the GPU of this
            rank, or the CPU where there is no GPU or the environment hides them.

    Raises:
        UserError: the device is not available, or `name` is None beside a GPU that PyTorch cannot use.
        RankError: this node has fewer GPUs than ranks.
    """
    if name is None:
        name = "cuda" if not hidden() and (cuda_available() or cuda_problem()) else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here (try cpu)") from None
    if not cuda_available():
        raise UserError(f"{cuda_problem() or 'no CUDA GPU is visible'}; --device cpu computes on the CPU")
    index, gpus = local_rank() if device.index is None else device.index, torch.cuda.device_count()
    if index >= gpus:
        whose = f"local rank {index} has no GPU" if device.index is None else f"--device {name}: no such GPU"
        raise RankError(f"{whose}: this node has {gpus}")
    return torch.device("cuda", index)


def cuda_available() -> bool:
    with warnings.catch_warnings():  # PyTorch warns of an old driver in several lines
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def hidden() -> bool:
    """Whether the environment hides the GPUs on purpose: CUDA_VISIBLE_DEVICES is empty, or DS_ACCELERATOR is cpu."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return visible.strip() in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`; from pinned memory, so that the host does not wait for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def has_bf16_products(device: torch.device) -> bool:
    """Whether `device` has instructions for products of bf16: a GPU from Ampere on, a CPU with AVX512_BF16.

    PyTorch computes bf16 without them too, slower than fp32: ``torch.cuda.is_bf16_supported()`` and
    ``torch.ops.mkldnn._is_mkldnn_bf16_supported()`` are true where it is emulated (the latter with any AVX-512). Every
    CPU with AMX has AVX512_BF16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def set_tf32(on: bool) -> None:
    """Compute fp32 matmuls and convolutions on GPUs in TF32 (10 bits of mantissa), or in fp32.

    Without this call PyTorch computes products in fp32 and convolutions in TF32. After an assignment to
    ``torch.backends.cuda.matmul.fp32_precision``, ``torch.get_float32_matmul_precision()`` raises, and torch.compile
    calls it. The two statements below avoid that.
    """
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def describe(device: torch.device) -> str:
    """Name of a device, with the driver of a GPU or the threads that PyTorch takes of a CPU."""
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return f"CPU ({threads} thread{'s' * (threads > 1)})"
    found = driver()
    return torch.cuda.get_device_name(device) + (f" ({found})" if found else "")
