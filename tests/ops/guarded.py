"""Memory that faults where a kernel accesses it out of bounds.

Under Triton's interpreter a kernel reads and writes the addresses that a GPU would. Each tensor gets pages of its own,
and an unreadable page directly after its last element or directly before its first one: an access out of bounds is a
segmentation fault. So each case runs in a process of its own, and faulthandler names the Python line.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

Side = Literal["end", "start"]
SIDES: tuple[Side, ...] = ("end", "start")
Guard = Callable[[Tensor], Tensor]
PROT_NONE = 0


def guarded(x: Tensor, side: Side) -> Tensor:
    """`x`, copied with its strides against an unreadable page at its `side`; the memory is unmapped with the tensor."""
    if x.numel() == 0:
        return x
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = elements * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    page = ctypes.c_void_p(address + (pages if side == "end" else 0))
    if ctypes.CDLL(None, use_errno=True).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages - size if side == "end" else mmap.PAGESIZE
    flat = torch.frombuffer(memory, dtype=x.dtype, count=elements, offset=offset)
    flat.copy_(x.detach().as_strided((elements,), (1,)))
    return flat.as_strided(x.shape, x.stride())


def guarded_allocations(side: Side) -> AbstractContextManager:
    """Guard what PyTorch allocates for the launchers: outputs, temporary tensors and contiguous copies."""

    def guard(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(allocate)
        def allocated(*args, **kwargs) -> Tensor:
            out = allocate(*args, **kwargs)
            return out if out is args[0] or out.device.type != "cpu" else guarded(out, side)

        return allocated

    patches = ExitStack()
    for owner, names in (
        (torch, ("empty", "empty_like", "full", "ones", "zeros", "zeros_like")),
        (Tensor, ("contiguous", "new_empty", "new_full", "new_ones", "new_zeros")),
    ):
        for name in names:
            patches.enter_context(mock.patch.object(owner, name, guard(getattr(owner, name))))
    return patches


def assert_within_bounds(case: Callable[..., None], *arguments: object, sides: Sequence[Side] = SIDES) -> None:
    """Run ``case(guard, *arguments)`` under the interpreter, once per side, at the same time.

    `case` is a function of a module; `guard` places a tensor against an unreadable page.

    Raises:
        AssertionError: an access is out of bounds; it names the side and the Python line.
    """
    context = multiprocessing.get_context("forkserver")  # forked from a process that has imported the case's module
    context.set_forkserver_preload([case.__module__])
    with ExitStack() as files:
        running = []
        for side in sides:
            report = files.enter_context(tempfile.NamedTemporaryFile("r"))
            process = context.Process(target=_run, args=(report.name, side, case, *arguments))
            with mock.patch.dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""):
                process.start()
            running.append((side, process, report))
        for _, process, _ in running:
            process.join()
        for side, process, report in running:
            if process.exitcode == -signal.SIGSEGV:
                raise AssertionError(f"access out of bounds at a tensor's {side}:\n{report.read()}")
            assert process.exitcode == 0, report.read()


def _run(report: str, side: Side, case: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    with open(report, "w") as file:
        faulthandler.enable(file, all_threads=False)
        with guarded_allocations(side):
            case(lambda x: guarded(x, side), *arguments)
