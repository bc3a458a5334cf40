"""Sets of remote shards, which are read as local ones are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from ...config import CacheConfig
from ...errors import UserError
from ..shards.index import Shard
from ..shards.patterns import split, without_secrets
from ..shards.scan import Bad
from ..shards.shard_set import ShardSet
from .cache import Cache, CachedShard
from .order import STRIDE
from .sources import RemoteShard, is_remote, list_shards

listed: dict[str, list[RemoteShard]] = {}  # the shards of each pattern that this process has asked for


def remote_shards(patterns: str | Sequence[str], settings: CacheConfig) -> list[RemoteShard] | None:
    """The shards of remote patterns; None: the patterns are local. A pattern is listed once in a process.

    Raises:
        UserError: as :func:`~.sources.list_shards`; the patterns are of both kinds.
    """
    whole = [patterns] if isinstance(patterns, str) else patterns
    parts = [part for pattern in whole for part in split(pattern)]
    remote = [part for part in parts if is_remote(part)]
    local = [part for part in parts if not is_remote(part)]
    if not remote:
        return None
    if local:
        named = f"{local[0]} and {without_secrets(remote[0])}"
        raise UserError(f"{named}: name local and remote shards as two sets of data.shards")
    for part in remote:
        if part not in listed:
            listed[part] = list_shards(part, settings.path / "listings")
    return list(dict.fromkeys(shard for part in remote for shard in listed[part]))


class RemoteSet(ShardSet):
    """Remote shards as a set. Shard i's samples are numbered from i * STRIDE on; it is fetched when it is read."""

    shards: list[CachedShard]  # pyright: ignore[reportIncompatibleVariableOverride] - it has what reading takes

    def __init__(self, remote: Sequence[RemoteShard], cache: Cache) -> None:
        shards: Any = [CachedShard(shard, cache) for shard in remote]
        super().__init__(shards, np.full(len(shards), STRIDE))
        self.cache = cache

    @property
    def fingerprint(self) -> str:
        return "".join(f"{shard.remote.place} {shard.remote.size}\n" for shard in self.shards)

    @property
    def bad(self) -> list[Bad]:
        known = (self.cache.known(shard.remote) for shard in self.shards if shard.counts and shard.counts[1])
        return [bad for shard in known if shard is not None for bad in shard.bad]

    @ShardSet.counts.setter
    def counts(self, counts: Sequence[Sequence | None]) -> None:
        """Take over what an earlier process knew, so that nothing is fetched to be counted."""
        for shard, known in zip(self.shards, counts, strict=True):
            if known is not None:
                shard.counts = known[0], known[1], known[2]

    def alternatives(self, number: int) -> tuple[int, int]:
        shard = number // STRIDE
        return shard * STRIDE, len(self.shards[shard])

    def fetch(self, shards: Sequence[int], workers: int, *, progress: bool = True) -> None:
        """Count these shards, and fetch those of them that were never indexed here."""
        wanted = [self.shards[number].remote for number in shards if not self.shards[number].known]
        for _ in fetched(self.cache, wanted, workers, progress=progress):
            pass
        for number in shards:
            len(self.shards[number])


def fetched(cache: Cache, shards: Sequence[RemoteShard], workers: int, *, progress: bool = True) -> Iterator[Shard]:
    """Get all shards into the cache, `workers` at a time; yields them in order. They need not stay there."""
    total = sum(shard.size or 0 for shard in shards) or None
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="fetch", disable=not progress or not shards) as bar,
        ThreadPoolExecutor(workers, thread_name_prefix="mixreorg-fetch") as pool,
    ):
        try:
            for shard, got in zip(shards, pool.map(cache.get, shards), strict=True):
                bar.update(cache.size_of(shard))
                yield got
        except BaseException:  # also of a caller that takes no more
            cache.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            cache.stop.clear()
            raise


def open_remote_shards(remote: Sequence[RemoteShard], cache: Cache, workers: int, *, progress: bool) -> ShardSet:
    """Remote shards as a set of local ones: all are fetched and counted; a read fetches an evicted one again."""
    shards: Any = [CachedShard(shard, cache) for shard in remote]
    for _ in fetched(cache, [shard for shard in remote if not cache.ready(shard)], workers, progress=progress):
        pass
    return ShardSet(shards)
