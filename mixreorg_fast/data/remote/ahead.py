"""Fetching shards ahead of the run, in the order in which the run will read them."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from .cache import Cache, CachedShard
from .download import Stopped
from .order import RemoteOrder


class ShardAhead:
    """Threads that fetch the shards that a run will read next, as many as the cache holds.

    The processes of a node share the work: what one is fetching, the others leave to it.

    Args:
        sets: shards and order of each remote set of the run. Nothing is fetched for a set before its order is asked.
        workers: shards fetched at a time.
        behind: samples of the run by which other ranks may be behind, and so still read the window before.
    """

    def __init__(
        self, cache: Cache, sets: Sequence[tuple[Sequence[CachedShard], RemoteOrder]], workers: int, behind: int
    ) -> None:
        self._cache, self._sets, self._behind = cache, sets, behind
        self._listed = all(shard.remote.size is not None for shards, _ in sets for shard in shards)
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
        """Stop fetching, also what waits for a shard; what is on its way is kept as far as it has come."""
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
            try:
                if shard is None:
                    self._cache.stop.wait(0.1)
                else:
                    self._cache.get_unless_coming(shard.remote)
            except Stopped:
                return
            except (UserError, OSError):
                pass  # the loader meets the same error when it reads this shard

    def _next(self) -> CachedShard | None:
        """The next shard of the plan, which changes when an order reaches another window or sizes become known."""
        places = [(order.current, order.just_begun(self._behind)) for _, order in self._sets]
        if self._planned != (situation := (places, self._cache.learned)):
            self._planned = situation
            self._plan = iter(self._needed())
        return next(self._plan, None)

    def _needed(self) -> list[CachedShard]:
        """The shards that will be read next, soonest first, as many as the cache holds."""
        needed: dict[Path, CachedShard] = {}
        room = self._cache.room
        for shard in self._coming():
            if shard.path in needed:
                continue
            room -= self._cache.size_of(shard.remote)
            if room < 0:
                break
            needed[shard.path] = shard
        return list(needed.values())

    def _coming(self) -> Iterator[CachedShard]:
        """Window by window of each set, for an epoch; while no shard's size is known, this window only."""
        asked = [(shards, order, order.current) for shards, order in self._sets if order.current is not None]
        epoch = max((order.windows for _, order, _ in asked), default=0)
        for step in range(-1, epoch + 1 if self._listed or self._cache.learned else 1):
            for shards, order, current in asked:
                if step >= 0 or order.just_begun(self._behind):
                    yield from (shards[number] for number in order.shards_of(max(0, current + step)))
