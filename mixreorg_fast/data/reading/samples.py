"""Samples by number: read from their shards by several threads, bad ones replaced by others of their set."""

from __future__ import annotations

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ...config import DataConfig
from ...errors import UserError
from ...ranks import local_size
from ..shards.scan import Bad
from ..shards.shard_set import Sample, ShardSet
from .decoder import Decoder
from .order import replacement

log = logging.getLogger("mixreorg_fast")

Found = tuple[int, Sample, tuple[int, int]]  # a sample with its number, and its photo's height and width
MOST_THREADS = 16  # more threads than this find no work beside a GPU's decoder


def reading_threads(data: DataConfig) -> int:
    """Threads of a rank that read and decode: ``data.threads``, else its share of the node's cores, at most
    MOST_THREADS; never more than there are cores."""
    cores = len(os.sched_getaffinity(0))
    return min(data.threads, cores) if data.threads else max(1, min(cores // local_size(), MOST_THREADS))


class SampleReader:
    """Reads samples with a small pool of threads. Readers may share `shards`: each opens files of its own."""

    def __init__(self, shards: ShardSet, threads: int, device: torch.device) -> None:
        self.bad: dict[int, Bad] = {}  # the bad samples found so far, by number
        self._shards = ShardSet(shards.shards, shards.sizes)
        self._threads = threads
        self._alternatives = shards.alternatives
        self._decoder = Decoder(device, 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mixreorg-read")
        self._warned: set[str] = set()

    def read(
        self, numbers: np.ndarray, *, substitute: bool = True
    ) -> tuple[list[int], list[Sample], list[np.ndarray], np.ndarray]:
        """Samples by number. A bad one is replaced by a good one of its set (:func:`~.order.replacement`) or, without
        `substitute`, left out. The replacement does not depend on when a sample was found bad, so order and resuming
        stay exact.

        Returns:
            numbers, samples: those that were read.
            encoded: their photos' bytes, uint8 each; sizes: the photos' heights and widths, int64 ``[B, 2]``.
        """
        self._shards.open_for(numbers)
        parts = np.array_split(numbers, self._threads)  # one task per thread: a task costs more than a cached read
        tasks = self._pool.map(lambda part: [self._read(number) for number in part.tolist()], parts)
        read = [found for task in tasks for found in task]
        if substitute:
            read = [found or self._replacement(number) for number, found in zip(numbers.tolist(), read, strict=True)]
        kept = [found for found in read if found]
        encoded = [np.frombuffer(sample.image, np.uint8) for _, sample, _ in kept]
        sizes = np.array([size for *_, size in kept], dtype=np.int64).reshape(-1, 2)
        return [number for number, *_ in kept], [sample for _, sample, _ in kept], encoded, sizes

    def find_bad(self, numbers: list[int], encoded: list[np.ndarray], failure: RuntimeError) -> None:
        """Mark the photos that made a batch fail, by decoding its halves, their halves and so on.

        Raises:
            RuntimeError: `failure`, if every photo decodes and `failure` names none.
        """
        bad = self._decoder.failing(encoded)
        # A photo may decode whole and fail in its crop; DALI then names it.
        bad = bad or {int(place): "cannot be decoded" for place in re.findall(r"sample #(\d+)", str(failure))}
        if not bad:
            raise failure
        for place, reason in bad.items():
            self._mark(numbers[place], reason)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._shards.close()

    def _replacement(self, number: int) -> Found:
        first, count = self._alternatives(number)
        for attempt in range(64 + count):
            other = replacement(number, attempt, first, count)
            if other not in self.bad:
                self._shards.open_for(np.array([other]))
                if found := self._read(other):
                    return found
        shard = self._shards.bad_sample(number, "").shard
        raise UserError(f"not one sample of the shards can be used ({shard} …); see `mixreorg shards verify`")

    def _read(self, number: int) -> Found | None:
        """None for a bad sample."""
        if number not in self.bad:
            try:
                sample = self._shards.read(number)
                return number, sample, self._decoder.size(sample.image)
            except (ValueError, OSError) as error:  # not a photo, or no caption; the shard is cut or gone
                self._mark(number, str(error), shard_wide=isinstance(error, OSError))
        return None

    def _mark(self, number: int, reason: str, *, shard_wide: bool = False) -> None:
        """Note a bad sample. A `shard_wide` reason is logged once."""
        bad = self._shards.bad_sample(number, reason)
        if self.bad.setdefault(number, bad) is not bad:  # another thread was first
            return
        if not shard_wide:
            log.warning("%s", f"{bad}; another sample replaces it".replace("\t", ": "))
        elif reason not in self._warned:
            self._warned.add(reason)
            log.warning("%s; other samples replace its samples", reason)
