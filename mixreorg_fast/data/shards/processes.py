"""Worker processes that report their progress, and end when the process that started them ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from types import ModuleType
from typing import Any

from tqdm import tqdm

from ...errors import UserError

_advance: Callable[[int], Any] | None = None


def advance(number: int) -> None:
    """Count `number` items done, for the progress bar of the pool that runs this code, if there is one."""
    if _advance is not None:
        _advance(number)


@contextlib.contextmanager
def pool(workers: int, bar: tqdm | None = None) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A ``map`` over `workers` processes, results in order; with one worker it runs in this process.

    The processes are started afresh rather than forked: the caller may have threads. Where one of them is killed, a
    :class:`UserError` says so.
    """
    global _advance
    bar = bar if bar is not None else tqdm(disable=True)
    if workers == 1:
        before, _advance = _advance, bar.update
        try:
            yield map
        finally:
            _advance = before
        return
    context = get_context("spawn")
    count = context.Value("q", 0)
    start = bar.n
    executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(count,))

    def run(function: Callable, jobs: Iterable) -> Iterator:
        with _without_main():
            results = deque(executor.submit(function, job) for job in jobs)
        while results:
            done = wait([results[0]], timeout=0.2).done
            bar.update(start + count.value - bar.n)
            if done:
                yield results.popleft().result()

    try:
        yield run
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); fewer workers need less memory") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started here do not import the caller's script again: it may lack a ``__main__`` guard."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(count: Any) -> None:
    """Runs first in each process of a pool."""
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
