"""Compile real launches for a GPU that is not there, and read what the compiled kernels take.

Launchers run on meta tensors: they choose their configuration and specialise as on the GPU in question, and Triton
compiles; nothing is launched. A process of its own is needed where ``TRITON_INTERPRET=1`` is set, since nothing
compiles there.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import variants

# The most shared memory that one block may take, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Launch:
    """A kernel as one launch compiles it, and what it takes."""

    kernel: str
    variant: str  # its constexprs and the types of its other arguments
    architecture: int
    programs: int
    num_warps: int
    registers: int  # of a thread
    spill_bytes: int  # stack of a thread: there is nothing else that these kernels keep there
    shared_bytes: int  # of a block
    instructions: int  # of the compiled code, each counted once


class _Driver:
    """What a launch asks Triton's driver for; devices are numbered by architecture, so each has its own cache."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def offline(architecture: int) -> Iterator[list[Launch]]:
    """Within it, kernels take meta tensors and compile for sm_`architecture`; gives the launches so far, each variant
    once."""
    if variants.INTERPRET:
        raise RuntimeError("kernels do not compile in an interpreting process; unset TRITON_INTERPRET")
    launches: dict[Any, Launch] = {}
    run, driver = JITFunction.run, triton.runtime.driver
    # A fresh list per call, in the order of the launches.
    found: list[Launch] = []

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in launches:
            launches[kernel.hash] = _describe(self, kernel, architecture, grid)
            found.append(launches[kernel.hash])
        return kernel

    before, active = variants.offline_architecture, driver._active
    variants.offline_architecture = architecture
    driver.set_active(_Driver(architecture))
    JITFunction.run = compiled
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = active
        variants.offline_architecture = before


def _describe(function: JITFunction, kernel: Any, architecture: int, grid: tuple[int, ...]) -> Launch:
    programs = 1
    for size in grid:
        programs *= size
    names = [parameter.name for parameter in function.params]
    constants = [f"{names[path[0]]}={value}" for path, value in kernel.src.constants.items()]
    types = dict.fromkeys(kind for kind in kernel.src.signature.values() if kind != "constexpr")
    return Launch(
        kernel=function.fn.__name__.strip("_").removesuffix("_kernel"),
        variant=", ".join([*(kind for kind in types if kind.startswith("*")), *constants]),
        architecture=architecture,
        programs=programs,
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        **_resources(kernel.asm["cubin"]),
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and instructions, by the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spill_bytes": int(stack),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!.*\bNOP\b)", code, re.MULTILINE)),
    }


def _tool(name: str, *arguments: str) -> str:
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
