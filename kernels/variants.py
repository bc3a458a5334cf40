"""What all kernels share: the devices they run on, and their launch configurations.

Each kernel has a small table of configurations, one per architecture, fixed and checked in. With
``MIXREORG_RETUNE=1`` a launcher instead times its candidates once per shape and prints the winner, to be pasted into
the table.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The most shared memory that one block may take, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHITECTURES = tuple(SHARED_BYTES)  # compute capabilities that configurations are checked for
offline_architecture: int | None = None  # that launches compile for without a GPU, set by offline.compiling


@dataclass(frozen=True)
class Config:
    """One launch configuration: block sizes (constexprs of the kernel), warps, pipeline stages, and the most registers
    of a thread, where the compiler's own limit would spill or let fewer programs run at a time."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 2
    most_registers: int | None = None

    @functools.cached_property
    def kwargs(self) -> dict[str, int | None]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.most_registers}
        return {**self.blocks, **options}


Table = Mapping[int, Config]  # by architecture


def flag(name: str) -> bool:
    """An environment switch: on for 1, true, yes, on."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


INTERPRET = flag("TRITON_INTERPRET")  # Triton runs kernels on the CPU, operation by operation
RETUNE = flag("MIXREORG_RETUNE")


def architecture(device: torch.device) -> int:
    """The compute capability of `device` as one number; 90 under the interpreter."""
    return _capability(device) if device.type == "cuda" else offline_architecture or 90


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launches_on(device: torch.device) -> bool:
    """Whether kernels take tensors of `device`: CUDA; the CPU under the interpreter; meta while compiling offline."""
    interpreted = INTERPRET and device.type == "cpu"
    return device.type == "cuda" or interpreted or (offline_architecture is not None and device.type == "meta")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, on which Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE


_HERE = contextlib.nullcontext()  # made once: every launch enters it


def with_unit_channel_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its channels, the last dimension, are not adjacent: views are read in place."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient, rounded up; on the host ``triton.cdiv`` takes 2 µs, and so does ``triton.next_power_of_2``."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


_winners: dict[Hashable, Config] = {}


def tuned(
    name: str, launch: Callable[[Config], Any], like: Tensor, table: Table, candidates: list[Config], shape: Hashable
) -> Any:
    """Run ``launch(config)`` and return its result. The configuration is that of `table` for the architecture of
    `like`; without one, that of the newest older architecture, else of the oldest one.

    With ``MIXREORG_RETUNE=1`` the configuration is the fastest of `candidates` for the dtype of `like` and this
    `shape`, printed under the kernel's `name`. Candidates that need more than the device has are skipped. `launch` must
    have no side effect other than its own output.
    """
    capability = architecture(like.device)
    if INTERPRET or not RETUNE:
        if capability not in table:
            capability = max((known for known in table if known <= capability), default=min(table))
        return launch(table[capability])
    key = (name, capability, like.dtype, shape)
    if key not in _winners:
        from triton.testing import do_bench

        milliseconds = functools.partial(do_bench, return_mode="median")
        calls = [functools.partial(launch, config) for config in candidates]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            fitting = list(pool.map(functools.partial(_fits, like), calls))  # compiles, several at a time
        times = [milliseconds(call) if fits else float("inf") for call, fits in zip(calls, fitting, strict=True)]
        _winners[key] = best = candidates[times.index(min(times))]
        print(f"{name} sm_{capability} {like.dtype} {shape}: {best} {min(times):.4f} ms", file=sys.stderr)
    return launch(_winners[key])


def _fits(like: Tensor, call: Callable[[], Any]) -> bool:
    """Whether the device of `like` has the resources for `call`; runs in any thread."""
    from triton.runtime.errors import OutOfResources

    try:
        with torch.no_grad(), on_device(like):
            call()
    except OutOfResources:
        return False
    return True
