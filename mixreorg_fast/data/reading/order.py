"""Which sample stands at which position of a run, and the random numbers of that position.

Both are pure functions of (seed, position) and the sizes of the shards. So a run resumes from one integer, and any
number of ranks reads the same samples, augmented the same way.
"""

from __future__ import annotations

import enum
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Purpose(enum.IntEnum):
    """What random numbers are drawn for. Each purpose has a stream of its own."""

    SHARDS, WINDOW, CROP, FLIP, JITTER, RAND_AUGMENT, ERASE, CAPTION, NOUNS, SETS, REPLACEMENT = range(11)


def uniforms(seed: int, purpose: Purpose, position: int, count: int, columns: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 ``[count, columns]``: row i belongs to position + i in every call.

    One counter-based Philox stream per (seed, purpose); a position owns a fixed stretch of it.
    """
    blocks = -(-columns // 4)  # Philox yields four numbers per count
    raw = _philox(seed, purpose, position * blocks).random_raw(count * blocks * 4)
    return (raw.reshape(count, blocks * 4)[:, :columns] >> np.uint64(11)) * 2.0**-53


class WindowedOrder(ABC):
    """Samples in the order of a run: each once per epoch, shuffled from (seed, epoch).

    The shuffle keeps reads local, for spinning and network disks: the shards are shuffled, then the samples within
    windows of several shards. Windows are numbered from the beginning of the run, across epochs.

    Args:
        shards: how many there are.
        window: shards whose samples are shuffled together.
        stream: a further number to shuffle by, for several orders under one seed.
    """

    span: int  # sample numbers are below it

    def __init__(self, shards: int, seed: int, window: int, stream: int) -> None:
        self._seed, self._window, self._stream = seed, window, stream
        self.windows = -(-shards // window)  # of an epoch
        # Neighbouring batches fall into the same window; two of each are in use where one ends.
        self._epoch = functools.lru_cache(2)(lambda epoch: permutation(shards, seed, Purpose.SHARDS, epoch, 0, stream))
        self._shuffled = functools.lru_cache(2)(self._shuffle_window)

    @property
    def samples(self) -> int:
        """The samples of an epoch."""
        return self.span

    @abstractmethod
    def _find(self, position: int) -> tuple[int, int]:
        """The window that holds a position of the run, and the window's first position."""

    @abstractmethod
    def _numbers(self, shard: int) -> np.ndarray:
        """The numbers of a shard's samples."""

    def at(self, position: int, count: int) -> np.ndarray:
        """Sample numbers, int64 ``[count]``, at positions position … position + count - 1 of the run."""
        parts = [np.zeros(0, np.int64)]
        while count:
            window, first = self._find(position)
            parts.append(self._shuffled(window)[position - first : position - first + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def shards_of(self, window: int) -> list[int]:
        """The shards of a window."""
        epoch, part = divmod(window, self.windows)
        return self._epoch(epoch)[part * self._window : (part + 1) * self._window].tolist()

    def _shuffle_window(self, window: int) -> np.ndarray:
        numbers = np.concatenate([self._numbers(shard) for shard in self.shards_of(window)])
        epoch, part = divmod(window, self.windows)
        return numbers[permutation(len(numbers), self._seed, Purpose.WINDOW, epoch, part, self._stream)]


class Order(WindowedOrder):
    """The order of shards with `sizes` samples; the other arguments are as of :class:`WindowedOrder`."""

    def __init__(self, sizes: np.ndarray, seed: int, *, window: int = 16, stream: int = 0) -> None:
        super().__init__(len(sizes), seed, window, stream)
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.span = int(self._sizes.sum())

    def _find(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.span)
        sizes = np.add.reduceat(self._sizes[self._epoch(epoch)], np.arange(0, len(self._sizes), self._window))
        starts = np.cumsum(sizes) - sizes
        part = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch * self.windows + part, epoch * self.span + int(starts[part])

    def _numbers(self, shard: int) -> np.ndarray:
        return np.arange(self._sizes[shard], dtype=np.int64) + self._starts[shard]


class Mixture:
    """Samples of several sets, drawn by weight: each set in an :class:`Order` of its own.

    The positions of a run are cut into blocks of 65,536. Every block holds each set by its share, to within one
    position, in an order drawn from (seed, block). So the set of a position, and the set's number of earlier
    positions, follow from (seed, position) directly.

    Args:
        orders: of the sets, with their number as `stream`; the sets' samples are numbered one set after the other.
        weights: of the sets, positive; their sum does not matter.

    Raises:
        ValueError: a weight is too small for its set to appear in a block.
    """

    BLOCK = 65_536

    def __init__(self, orders: Sequence[WindowedOrder], weights: Sequence[float], seed: int) -> None:
        self._orders = orders
        self._offsets = np.cumsum([0, *(order.span for order in orders)])
        self._seed = seed
        bounds = np.cumsum(np.asarray(weights, dtype=np.float64)) / np.sum(weights, dtype=np.float64)
        ends = np.rint(bounds * self.BLOCK).astype(np.int64)
        self._per_block = np.diff(ends, prepend=0)  # positions of each set
        if (self._per_block < 1).any():
            raise ValueError(f"a weight is less than 1/{self.BLOCK} of their sum")
        self._block = functools.lru_cache(2)(self._shuffle_block)

    @property
    def samples(self) -> int:
        return sum(order.samples for order in self._orders)

    def at(self, position: int, count: int) -> np.ndarray:
        """Sample numbers, int64 ``[count]``, at positions position … position + count - 1 of the run."""
        parts = [np.zeros(0, np.int64)]
        while count:
            block, place = divmod(position, self.BLOCK)
            sets = self._block(block)
            here = sets[place : place + count]
            before = np.bincount(sets[:place], minlength=len(self._orders)) + block * self._per_block
            samples = np.empty(len(here), np.int64)
            for number in np.unique(here):
                mine = here == number
                drawn = self._orders[number].at(int(before[number]), int(mine.sum()))
                samples[mine] = drawn + self._offsets[number]
            parts.append(samples)
            position, count = position + len(here), count - len(here)
        return np.concatenate(parts)

    def _shuffle_block(self, block: int) -> np.ndarray:
        """The set of each position of a block."""
        sets = np.repeat(np.arange(len(self._orders)), self._per_block)
        return sets[permutation(self.BLOCK, self._seed, Purpose.SETS, block)]


def replacement(sample: int, attempt: int, first: int, count: int) -> int:
    """The sample that replaces a bad one among first … first + count - 1: a random one, the same in every run.

    Not its neighbour: all samples of a lost shard would get the same one. After 64 attempts, when hardly any good
    sample is left, the samples are tried one by one.
    """
    if attempt < 64:
        return first + int(_philox(0, Purpose.REPLACEMENT, 0, sample, attempt).random_raw()) % count
    return first + (sample - first + attempt - 63) % count


def permutation(count: int, seed: int, purpose: Purpose, *counter: int) -> np.ndarray:
    # Sorting raw bits rather than Generator.permutation, whose algorithm numpy may change between releases.
    return np.argsort(_philox(seed, purpose, 0, *counter).random_raw(count), kind="stable")


def _philox(seed: int, purpose: Purpose, *counter: int) -> np.random.Philox:
    words = np.array([*counter, *[0] * (4 - len(counter))], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed % 2**64, int(purpose)], dtype=np.uint64), counter=words)
