"""The order of remote samples: that of local ones, learned as the shards arrive."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from ...errors import UserError
from ..reading.order import WindowedOrder
from .cache import CachedShard

STRIDE = 1 << 32  # sample numbers that a shard may use: its first does not depend on the shards before it


class RemoteOrder(WindowedOrder):
    """The order of :class:`~..reading.order.Order`, for shards that are not all fetched.

    How many samples a shard holds is asked when its window is reached. The order is still a function of the seed and
    of what the shards hold, not of when they come. Shard i's samples are i * STRIDE, i * STRIDE + 1, …

    Args:
        shards: their lengths are asked for, which may fetch them. seed, window, stream: as of :class:`WindowedOrder`.
    """

    def __init__(self, shards: Sequence[CachedShard], seed: int, *, window: int = 16, stream: int = 0) -> None:
        super().__init__(len(shards), seed, window, stream)
        self.shards = shards
        self.span = len(shards) * STRIDE
        self.current: int | None = None  # the window that is read or waited for
        self._begins = [0]  # positions at which the windows of the run begin, as far as they are known
        self._position = 0

    @property
    def samples(self) -> int:
        """The samples of an epoch, estimated from its first window: the other shards may not have been fetched yet."""
        return round(self._count(0) * len(self.shards) / len(self.shards_of(0)))

    def just_begun(self, samples: int) -> bool:
        """Whether the current window, unless it is the first, began fewer than `samples` samples ago."""
        return bool(self.current) and self._position - self._begins[self.current] < samples

    def _find(self, position: int) -> tuple[int, int]:
        """As of any order. Raises a :class:`UserError` if a shard cannot be fetched, or no shard holds a sample."""
        while position >= (begin := self._begins[-1]):
            window = len(self._begins) - 1
            if window >= self.windows and not begin:
                raise UserError("data.shards: no shard holds a sample that can be used")
            self._begins.append(begin + self._count(window))
        window = bisect.bisect_right(self._begins, position) - 1
        self._shuffled(window)  # may wait for shards: until then the window before is the current one
        self.current, self._position = window, position
        return window, self._begins[window]

    def _count(self, window: int) -> int:
        shards = [self.shards[number] for number in self.shards_of(window)]
        if not all(shard.known for shard in shards):
            self.current = window  # what to fetch ahead
        return sum(map(len, shards))

    def _numbers(self, shard: int) -> np.ndarray:
        return np.arange(len(self.shards[shard]), dtype=np.int64) + shard * STRIDE
