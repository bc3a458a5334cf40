"""Fetching shards ahead of the run, in the order in which the run will read them."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from .cache import Cache, CachedShard
from .download import Stopped
from .order import RemoteOrder


class ShardAhead:
    """Threads that fetch the shards that a run will read next, as many as the cache holds.

    The processes of a node share the work: none fetches a shard that another is fetching.

    Args:
        orders: of the remote sets of the run. Nothing is fetched for a set before its order is asked.
        workers: shards fetched at a time.
        behind: samples of the run by which other ranks may be behind, and so still read the window before.
    """

    def __init__(self, cache: Cache, orders: Sequence[RemoteOrder], workers: int, behind: int) -> None:
        self._cache, self._orders, self._behind = cache, orders, behind
        self._listed = all(shard.remote.size is not None for order in orders for shard in order.shards)
        cache.needed = lambda: [shard.path for shard in self._needed()]
        self._planned: object = None
        self._plan: Iterator[CachedShard] = iter(())
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"mixreorg-fetch-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # before the interpreter takes down what the threads use

    def close(self) -> None:
        """Stop the fetching threads and whoever waits for a shard. A partly fetched shard keeps its bytes."""
        self._cache.stop.set()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.close)

    def release(self) -> None:
        """Let others fetch again, after :meth:`close`."""
        self._cache.needed = list
        self._cache.stop.clear()

    def _run(self) -> None:
        while not self._cache.stop.is_set():
            with self._lock:
                shard = self._next()
            if shard is None:
                self._cache.stop.wait(0.1)
                continue
            with contextlib.suppress(Stopped, UserError, OSError):  # the loader meets the error when it reads the shard
                self._cache.get_unless_coming(shard.remote)

    def _next(self) -> CachedShard | None:
        """The next shard of the plan, which changes when an order reaches another window or sizes become known."""
        places = [(order.current, order.just_begun(self._behind)) for order in self._orders]
        if self._planned != (situation := (places, len(self._cache.sizes))):
            self._planned = situation
            self._plan = iter(self._needed())
        return next(self._plan, None)

    def _needed(self) -> list[CachedShard]:
        """The shards that will be read next, soonest first, as many as the cache holds."""
        needed: dict[Path, CachedShard] = {}
        room = self._cache.room
        for shard in self._coming():
            if shard.path not in needed:
                room -= self._cache.size_of(shard.remote)
                if room < 0:
                    break
                needed[shard.path] = shard
        return list(needed.values())

    def _coming(self) -> Iterator[CachedShard]:
        """Window by window of each set, for an epoch; while no shard's size is known, this window only."""
        asked = [(order, order.current) for order in self._orders if order.current is not None]
        epoch = max((order.windows for order, _ in asked), default=0)
        for step in range(-1, epoch + 1 if self._listed or self._cache.sizes else 1):
            for order, current in asked:
                if step >= 0 or order.just_begun(self._behind):
                    yield from (order.shards[number] for number in order.shards_of(max(0, current + step)))
