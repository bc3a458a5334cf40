"""Compile real launches without a GPU, and read the compiled kernels' registers, shared memory and instructions.

Launchers run on meta tensors: they choose their configuration and specialise as on the GPU in question, and Triton
compiles; nothing is launched. Kernels do not compile in a process with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import variants
from .miscompilation import faults


@dataclass(frozen=True)
class Launch:
    """A kernel as one launch compiles it, and its resources."""

    kernel: str
    variant: str  # its constexprs and the types of its other arguments
    architecture: int
    programs: int
    num_warps: int
    bytes: int  # of the tensors that it is given
    shared_bytes: int  # of a block
    registers: int  # of a thread
    spill_bytes: int  # stack of a thread, which these kernels use for spills only
    instructions: int  # of a warp outside loops
    loops: tuple[int, ...]  # instructions of one round of each loop, those of loops within it left out
    sizes: dict[str, int]  # its whole numbers, constexprs included
    faults: tuple[str, ...]  # signs that a compiler produced wrong code, see miscompilation.py


@contextlib.contextmanager
def compiling(architecture: int, run: Callable[..., Any]) -> Iterator[None]:
    """Within it, launches choose their configuration for sm_`architecture` and call `run` for :meth:`JITFunction.run`.

    Devices are numbered by architecture, so that each has its own cache of compiled kernels.
    """
    target = GPUTarget("cuda", architecture, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(variants, "offline_architecture", architecture),
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        yield


@contextlib.contextmanager
def offline(architecture: int) -> Iterator[list[Launch]]:
    """Within it, kernels take meta tensors and compile for sm_`architecture`; gives the launches so far."""
    if variants.INTERPRET:
        raise RuntimeError("kernels do not compile in an interpreting process; unset TRITON_INTERPRET")
    launches: list[Launch] = []
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        size = sum(x.nbytes for x in named.values() if isinstance(x, torch.Tensor))
        sizes = {name: value for name, value in named.items() if type(value) is int}
        launches.append(Launch(**_describe(self, kernel), programs=math.prod(grid), bytes=size, sizes=sizes))
        return kernel

    with compiling(architecture, compiled):
        yield launches


@functools.cache
def _describe(function: JITFunction, kernel: Any) -> dict[str, Any]:
    """Fields of :class:`Launch` from a compiled kernel's metadata and from the tools in Triton's package."""
    names = [parameter.name for parameter in function.params]
    constants = [f"{names[path[0]]}{[*path[1:]] or ''}={value}" for path, value in kernel.src.constants.items()]
    types = dict.fromkeys(kind for kind in kernel.src.signature.values() if str(kind).startswith("*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    instructions, loops = _count(code)
    return {
        "kernel": function.fn.__name__.strip("_").removesuffix("_kernel"),
        "variant": ", ".join([*types, *constants]),
        "architecture": kernel.metadata.target.arch,
        "num_warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "registers": int(registers),
        "spill_bytes": int(stack),
        "instructions": instructions,
        "loops": loops,
        "faults": faults(kernel.asm["ttgir"], code),
    }


def _count(code: str) -> tuple[int, tuple[int, ...]]:
    """Instructions of nvdisasm's listing outside its loops, and within each, in the order of their first lines.

    A loop is what lies between a label and a branch back to it.
    """
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    number = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif (instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.+?);", line)) and "NOP" not in instruction[1]:
            if target := re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1]):
                branches.append((target[1], number))
            number += 1
    # After its end, every program has a branch to itself.
    spans = sorted({(labels[target], end) for target, end in branches if labels[target] < end})
    loops = [range(first, end + 1) for first, end in spans]
    innermost = [min((loop for loop in loops if place in loop), key=len, default=None) for place in range(number)]
    counts = Counter(innermost)
    return counts[None], tuple(counts[loop] for loop in loops)


def _tool(name: str, *arguments: str) -> str:
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
