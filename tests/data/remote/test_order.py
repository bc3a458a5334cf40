"""Remote samples stand in the order of local ones, whenever their shards arrive."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from mixreorg_fast.data.reading.order import Order
from mixreorg_fast.data.remote.ahead import ShardAhead
from mixreorg_fast.data.remote.cache import Cache, CachedShard
from mixreorg_fast.data.remote.order import STRIDE, RemoteOrder
from mixreorg_fast.data.remote.sources import list_shards
from mixreorg_fast.errors import UserError

from .conftest import COUNTS


class Shard:
    """A shard of so many samples, which notes that it was asked for them."""

    def __init__(self, count: int) -> None:
        self._count, self.known = count, False

    def __len__(self) -> int:
        self.known = True
        return self._count


def local_number(numbers: np.ndarray, sizes: list[int]) -> list[int]:
    starts = np.cumsum(sizes) - sizes
    return (starts[numbers // STRIDE] + numbers % STRIDE).tolist()


def test_it_is_the_order_of_local_shards():
    sizes = [7, 0, 12, 3, 9, 1, 8, 5, 4, 6]
    local = Order(np.array(sizes), 3, window=4, stream=1)
    whole = local.at(0, 3 * local.samples)
    remote = RemoteOrder([Shard(size) for size in sizes], 3, window=4, stream=1)
    assert local_number(remote.at(0, len(whole)), sizes) == whole.tolist()
    for position in (0, 1, 54, 55, 100):
        resumed = RemoteOrder([Shard(size) for size in sizes], 3, window=4, stream=1)
        assert local_number(resumed.at(position, 13), sizes) == whole[position : position + 13].tolist()


def test_only_what_is_reached_is_asked_for():
    shards = [Shard(10) for _ in range(40)]
    order = RemoteOrder(shards, 0, window=4)
    assert order.samples == 400 and sum(shard.known for shard in shards) == 4
    order.at(0, 40)
    assert sum(shard.known for shard in shards) == 4 and order.current == 0 and order.windows == 10
    order.at(39, 2)
    assert sum(shard.known for shard in shards) == 8 and order.current == 1
    order.at(45, 1)
    assert order.just_begun(6) and not order.just_begun(5)
    with pytest.raises(UserError, match="no shard holds a sample"):
        RemoteOrder([Shard(0)] * 5, 0, window=2).at(0, 1)


def test_shards_are_fetched_ahead_in_a_cache_that_holds_some(web, tars, pattern, settings):
    """40 shards, a cache of eight, windows of two: each is fetched once an epoch."""
    content = list(tars.values())
    web.content = lambda path: content[int(path[6:10]) % len(content)]
    shards = list_shards(f"{web.url}/train-{{0000..0039}}.tar", settings().path)
    cache = Cache(settings(size=f"{8 * max(map(len, content))} B", patience=60))
    cached = [CachedShard(shard, cache) for shard in shards]
    order = RemoteOrder(cached, 5, window=2)
    ahead = ShardAhead(cache, [order], workers=3, behind=4)
    try:
        read = []
        total = 10 * sum(COUNTS)
        for position in range(0, total, 6):
            numbers = order.at(position, min(6, total - position))
            read += numbers.tolist()
            for shard in np.unique(numbers // STRIDE):
                os.close(cached[shard].open())
    finally:
        ahead.close()
    assert len(set(read)) == total
    asked = [request for request in web.requests if request.startswith("GET")]
    assert len(set(asked)) == 40 and len(asked) <= 40 + 12  # of the next epoch
    assert sum(path.stat().st_size for path in cache.folder.rglob("*.tar")) <= cache.size
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mixreorg-fetch")]
