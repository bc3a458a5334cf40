"""Worker processes that report their progress, and end when the process that started them ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from tqdm import tqdm

from ...errors import UserError

_count: Any = None  # shared by the processes of a pool


def advance(number: int) -> None:
    """Count `number` items done, for the progress bar of the pool that runs this code, if there is one."""
    if _count is not None:
        with _count.get_lock():
            _count.value += number


@contextlib.contextmanager
def pool(workers: int, bar: tqdm | None = None) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A ``map`` over `workers` processes, results in order; with one worker it runs in this process.

    The processes are started afresh rather than forked: the caller may have threads.

    Raises:
        UserError: a process was killed.
    """
    context = get_context("spawn")
    count = context.Value("q", 0)
    with contextlib.ExitStack() as stack:
        if bar is not None:
            stack.enter_context(_ticking(bar, count))
        if workers == 1:
            _share(count)
            stack.callback(_share, None)
            yield map
            return
        executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(count,))
        stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        try:
            yield executor.map
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); fewer --workers need less memory") from None


@contextlib.contextmanager
def _ticking(bar: tqdm, count: Any) -> Iterator[None]:
    """Have `bar` follow `count` from a thread."""
    done = threading.Event()
    start = bar.n

    def follow() -> None:
        while not done.wait(0.2):
            bar.update(start + count.value - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        bar.update(start + count.value - bar.n)


def _share(count: Any) -> None:
    global _count
    _count = count


def _begin(count: Any) -> None:
    """Runs first in each process of a pool."""
    _share(count)

    def follow() -> None:  # else it would wait for work forever after its parent was killed
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
