"""The order of remote samples: that of local ones, learned as the shards arrive."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ...errors import UserError
from ..reading.order import Purpose, permutation

STRIDE = 1 << 32  # sample numbers that a shard may use: its first does not depend on the shards before it


class Counted(Protocol):
    """A shard that tells its number of samples, and whether it can without being fetched."""

    @property
    def known(self) -> bool: ...

    def __len__(self) -> int: ...


class RemoteOrder:
    """Samples in the order of :class:`~mixreorg_fast.data.reading.order.Order`, of shards that are not all here.

    How many samples a shard holds is asked when its window is reached. The order is still a function of the seed and
    of what the shards hold, not of when they come. Shard i's samples are i * STRIDE, i * STRIDE + 1, …

    Args:
        shards: their lengths are asked for, which may fetch them.
        seed, window, stream: as of ``Order``.

    Attributes:
        span: sample numbers are below it.
        windows: of an epoch.
        current: the window that is read or waited for, None before that; windows count on over the epochs.
    """

    def __init__(self, shards: Sequence[Counted], seed: int, *, window: int = 16, stream: int = 0) -> None:
        self._shards, self._seed, self._window, self._stream = shards, seed, window, stream
        self.span = len(shards) * STRIDE
        self.windows = -(-len(shards) // window)
        self.current: int | None = None
        self._ends: list[int] = []  # positions at which the windows of the run end, as far as they are known
        self._position = 0
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle_shards)
        self._shuffled = functools.lru_cache(maxsize=2)(self._shuffle_window)

    @property
    def samples(self) -> int:
        """Of an epoch, by the mean of its first window: the other shards may not have been fetched yet."""
        first = self.shards_of(0)
        return round(self._count(0) * len(self._shards) / len(first))

    def at(self, position: int, count: int) -> np.ndarray:
        """Sample numbers, int64 ``[count]``, at positions position … position + count - 1 of the run.

        Raises:
            UserError: a shard cannot be fetched; no shard holds a sample.
        """
        parts = [np.zeros(0, np.int64)]
        while count:
            window = self._window_at(position)
            samples = self._shuffled(window)
            self.current, self._position = window, position
            offset = position - (self._ends[window] - len(samples))
            parts.append(samples[offset : offset + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def shards_of(self, window: int) -> list[int]:
        """The shards of a window, none before the run."""
        epoch, part = divmod(max(window, 0), self.windows)
        return self._epoch(epoch)[part * self._window : (part + 1) * self._window].tolist()

    def just_begun(self, samples: int) -> bool:
        """Whether the current window is not the first and so many samples ago was another one."""
        return bool(self.current) and self._position - self._ends[self.current - 1] < samples

    def _window_at(self, position: int) -> int:
        while not self._ends or position >= self._ends[-1]:
            window, before = len(self._ends), self._ends[-1] if self._ends else 0
            if window >= self.windows and not before:
                raise UserError("data.shards: no shard holds a sample that can be used")
            self._ends.append(before + self._count(window))
        return bisect.bisect_right(self._ends, position)

    def _count(self, window: int) -> int:
        shards = [self._shards[number] for number in self.shards_of(window)]
        if not all(shard.known for shard in shards):
            self.current = window  # what to fetch ahead
        return sum(map(len, shards))

    def _shuffle_shards(self, epoch: int) -> np.ndarray:
        return permutation(len(self._shards), self._seed, Purpose.SHARDS, epoch, 0, self._stream)

    def _shuffle_window(self, window: int) -> np.ndarray:
        shards = self.shards_of(window)
        numbers = np.concatenate([np.arange(len(self._shards[s]), dtype=np.int64) + s * STRIDE for s in shards])
        epoch, part = divmod(window, self.windows)
        return numbers[permutation(len(numbers), self._seed, Purpose.WINDOW, epoch, part, self._stream)]
