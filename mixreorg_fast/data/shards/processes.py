"""Worker processes that report their progress, and end when the process that started them ends; locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tqdm import tqdm

from ...errors import UserError

T = TypeVar("T")
_advance: Callable[[int], Any] | None = None


def advance(number: int) -> None:
    """Count `number` items done, for the progress bar of :func:`in_processes` that runs this code, if there is one."""
    if _advance is not None:
        _advance(number)


def in_processes(function: Callable[[Any], T], jobs: Sequence, workers: int, **bar: Any) -> Iterator[T]:
    """Yield `function` of each job, in order, from at most `workers` processes. One worker is this process.

    The processes are started afresh rather than forked: the caller may have threads. Where one of them is killed, a
    :class:`UserError` says so. `bar` are tqdm's options; :func:`advance` moves the bar.
    """
    global _advance
    workers = min(workers, len(jobs))
    with tqdm(**bar) as shown:
        if workers <= 1:
            before, _advance = _advance, shown.update
            try:
                yield from map(function, jobs)
            finally:
                _advance = before
            return
        context, start = get_context("spawn"), shown.n
        count = context.Value("q", 0)
        executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(count,))
        try:
            with _without_main():
                results = deque(executor.submit(function, job) for job in jobs)
            while results:
                done = wait([results[0]], timeout=0.2).done
                shown.update(start + count.value - shown.n)
                if done:
                    yield results.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); fewer workers need less memory") from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock file for this process; False: another process holds it, or its file system knows no locks."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except OSError:
            mine = False
        yield mine


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started here do not import the caller's script again: it may lack a ``__main__`` guard."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(count: Any) -> None:
    """Runs first in each process."""
    global _advance

    def add(number: int) -> None:
        with count.get_lock():
            count.value += number

    def follow() -> None:  # else it would wait for work forever after its parent was killed
        if parent := parent_process():
            parent.join()
        os._exit(1)

    _advance = add
    threading.Thread(target=follow, daemon=True).start()
