"""The shards that a run trains on: which they are, the order of their samples, the tokenizer of their captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config import Config, DataConfig
from ...errors import UserError
from ...ranks import local_rank, local_size
from ..remote.ahead import ShardAhead
from ..remote.cache import Cache
from ..remote.order import RemoteOrder
from ..remote.sets import RemoteSet, open_remote_shards, remote_shards
from ..shards.patterns import expand
from ..shards.scan import Bad
from ..shards.shard_set import Counts, ShardSet, open_shards
from ..text.tokenizer import Tokenizer
from .order import Mixture, Order
from .samples import reading_threads

# Half a million samples settle a tokenizer's merges. More samples only take time.
TOKENIZER_SAMPLES = 500_000
_caches: dict[str, Cache] = {}


class JoinedSets(ShardSet):
    """The samples of several sets, numbered one set after the other."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        super().__init__([s for part in sets for s in part.shards], np.concatenate([part.sizes for part in sets]))
        self._sets = sets

    def alternatives(self, number: int) -> tuple[int, int]:
        """First and count of the samples of which one may replace sample `number`: of its set, or its remote shard."""
        ends = np.cumsum([len(part) for part in self._sets])
        part = int(np.searchsorted(ends, number, side="right"))
        start = int(ends[part]) - len(self._sets[part])
        first, count = self._sets[part].alternatives(number - start)
        return start + first, count


@dataclass(frozen=True)
class TrainingSet:
    """The samples that a run trains on, from one set of shards or several, opened once."""

    config: Config
    sets: Sequence[ShardSet]  # local and remote ones
    remote: Sequence[tuple[RemoteSet, RemoteOrder]]  # the remote ones, each with its order
    cache: Cache | None  # of the remote ones
    order: Order | RemoteOrder | Mixture  # which sample stands at which position of a run
    shards: ShardSet  # of all sets
    digest: str  # of all that the order depends on besides the seed; when it changes, positions mean other samples

    @classmethod
    def open(cls, config: Config, *, warn: bool = False) -> TrainingSet:
        """Open the shards of ``data.shards``; errors and `warn` as of :func:`~..shards.shard_set.open_shards`. Remote
        shards are listed, and not fetched yet.

        Raises:
            UserError: the weight of a set is too small; remote shards cannot be listed.
        """
        patterns, weights = zip(*shard_sets(config.data), strict=True)
        sets: list[ShardSet] = []
        orders: list[Order | RemoteOrder] = []
        remote, cache, digest = [], None, hashlib.sha256()
        for number, (pattern, weight) in enumerate(zip(patterns, weights, strict=True)):
            listed = remote_shards(pattern, config.data.cache)
            if listed is None:
                sets.append(open_shards(pattern, warn=warn))
                orders.append(Order(sets[-1].sizes, config.seed, stream=number))
                digest.update(f"{weight} {sets[-1].sizes.tolist()}\n".encode())
            else:
                cache, window = open_cache(config.data), config.data.cache.window
                sets.append(part := RemoteSet(listed, cache))
                orders.append(order := RemoteOrder(part.shards, config.seed, window=window, stream=number))
                remote.append((part, order))
                places = [(str(shard.place), shard.size) for shard in listed]
                digest.update(f"{weight} {window} {places}\n".encode())
        try:
            order = orders[0] if len(orders) == 1 else Mixture(orders, weights, config.seed)
        except ValueError as error:
            raise UserError(f"data.shards: {error}; leave that set out") from None
        return cls(config, sets, remote, cache, order, JoinedSets(sets), digest.hexdigest())

    def __len__(self) -> int:
        """Samples of an epoch; those of remote shards by the mean of their first window, which is fetched for it."""
        return self.order.samples

    @property
    def indexed(self) -> int:
        """Samples of the shards that are indexed: of all local ones, and of the remote ones reached so far."""
        return sum(part.samples for part in self.sets)

    @property
    def lost(self) -> int:
        """Samples that the shards' indexes leave out, summed over the sets."""
        return sum(part.lost for part in self.sets)

    @property
    def bad(self) -> list[Bad]:
        """What the shards' indexes leave out: broken samples, lost ends of tars, files that are not tars."""
        return [bad for part in self.sets for bad in part.bad]

    def train_tokenizer(self, vocab_size: int) -> Tokenizer:
        """A tokenizer of the captions (see :meth:`Tokenizer.train`); of remote sets, those of the first window."""
        first: dict[ShardSet, list] = {p: [p.shards[n] for n in order.shards_of(0)] for p, order in self.remote}
        shards = [shard for part in self.sets for shard in first.get(part, part.shards)]
        return Tokenizer.train(ShardSet(shards).captions(TOKENIZER_SAMPLES), vocab_size)

    @property
    def is_remote(self) -> bool:
        """Whether some shards are fetched while the run reads."""
        return self.cache is not None

    @property
    def counts(self) -> list[list[Counts | None] | None]:
        """What is known of the remote shards; a run that resumes with it fetches nothing to find its place."""
        return [part.counts if isinstance(part, RemoteSet) else None for part in self.sets]

    def begin(self, counts: Sequence[Sequence | None] = (), *, progress: bool = False) -> None:
        """Fetch the first windows of remote shards, unless `counts` of an earlier process or the cache know them.

        Raises:
            UserError: the cache holds less than two windows; a shard cannot be fetched.
        """
        for part, known in zip(self.sets, counts, strict=False):
            if isinstance(part, RemoteSet) and known is not None:
                part.counts = known
        self._check_room()
        for part, order in self.remote:
            numbers = order.shards_of(0)
            own = numbers[local_rank() :: local_size()]  # then those of the node's other ranks, if they are slower
            part.fetch([*own, *(n for n in numbers if n not in own)], max(1, self._workers), progress=progress)
        self._check_room()  # sizes that no source lists are known now

    def fetch_ahead(self, behind: int) -> ShardAhead | None:
        """Fetch remote shards ahead of the run, shared by the processes of a node; None without remote shards. Another
        rank may be `behind` this one by so many samples."""
        if self.cache is None:
            return None
        return ShardAhead(self.cache, [order for _, order in self.remote], self._workers, behind)

    @property
    def _workers(self) -> int:
        """This rank's part of the node's workers: verifying takes as long as reading does, so it should be shared."""
        return len(range(local_rank(), self.config.data.cache.workers, local_size()))

    def _check_room(self) -> None:
        if (cache := self.cache) is None:
            return
        settings, need, least = self.config.data.cache, 0, 0
        for part, order in self.remote:
            numbers = {*order.shards_of(0), *order.shards_of(1)}
            sizes = [cache.size_of(part.shards[number].remote) for number in numbers]
            need, least = need + sum(sizes), least + 2 * max(sizes)
        if need > (room := cache.room):
            fits = f"data.cache.window {room // least} or " if room >= least else ""
            free = f"{cache.folder}: the disk's free space"
            limit = f"data.cache.size {settings.size}" if room == cache.size else free
            raise UserError(
                f"{limit} is less than two windows of {settings.window} shards ({need / 1e9:.3g} GB); "
                f"nearest: {fits}{-(-need // 10**6)} MB"
            )


def shard_sets(data: DataConfig) -> list[tuple[str | list[str], float]]:
    """Patterns and weights of the sets of ``data.shards``; a single set where no weights are given."""
    shards: Any = data.shards
    if isinstance(shards, str) or not shards or isinstance(shards[0], str):
        return [(shards, 1.0)]
    return [(part.pattern, part.weight) for part in shards]


def open_cache(data: DataConfig) -> Cache:
    """The cache of remote shards that ``data.cache`` describes, one in a process for all sets."""
    key = f"{data.cache.path} {data.cache.model_dump_json()} {data.verify} {reading_threads(data)}"
    if key not in _caches:
        _caches[key] = Cache(data.cache, verify=data.verify, threads=reading_threads(data))
    return _caches[key]


def check_patterns(patterns: str | list[str], data: DataConfig) -> None:
    """Raise a UserError if patterns stand for no shards; remote ones are listed."""
    if remote_shards(patterns, data.cache) is None:
        expand(patterns)


def open_validation_shards(data: DataConfig) -> ShardSet:
    """The shards of ``data.val_shards``; remote ones are fetched."""
    assert data.val_shards is not None
    remote = remote_shards(data.val_shards, data.cache)
    if remote is None:
        return open_shards(data.val_shards)
    return open_remote_shards(remote, open_cache(data), data.cache.workers, progress=not local_rank())
