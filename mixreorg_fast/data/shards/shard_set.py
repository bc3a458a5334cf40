"""Samples of several shards by number, read in place with one ``pread`` each."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UserError
from .index import Counts, Shard, open_shard, with_captions
from .pair import captions_of, nouns_of
from .patterns import expand
from .scan import Bad, read_member

log = logging.getLogger("mixreorg_fast")


@dataclass(frozen=True)
class Sample:
    """One image-text pair as it lies in its shard."""

    key: str
    image: bytes  # encoded
    captions: list[str]  # at least one
    json: bytes  # its further fields; b"" without any

    @property
    def nouns(self) -> list[str]:
        """The nouns (see :func:`~.pair.nouns_of`), parsed on access, since most runs do not use them."""
        return nouns_of(self.json)


def open_shards(patterns: str | Sequence[str], *, warn: bool = True) -> ShardSet:
    """The shards of `patterns`, indexed; damaged, empty and vanished ones are named in a warning and listed as bad.

    Raises:
        UserError: as :func:`~.patterns.expand` and :func:`~.index.with_captions`; no shard holds a sample.
    """
    shards = [with_captions(open_shard(path)) for path in expand(patterns)]
    if not any(len(shard.samples) for shard in shards):
        reason = "no sample can be used" if shards[0].verified else "no image with a .txt of the same name"
        reason = shards[0].problem or f"no samples ({reason}); expected pairs such as 0001.jpg + 0001.txt"
        raise UserError(f"{shards[0].path}: {reason}")
    for shard in shards if warn else ():
        if shard.gone:
            log.warning(
                "%s is gone; other samples replace its %d samples. To train without it, delete %s.index too",
                *(shard.path, len(shard.samples), shard.path),
            )
        elif shard.problem:
            log.warning("%s: %s; its %d whole samples are used", shard.path, shard.problem, len(shard.samples))
        elif not len(shard.samples):
            log.warning("%s holds no sample that can be used", shard.path)
    return ShardSet(shards)


class ShardSet:
    """Samples of several shards under one number, 0 … ``len(self) - 1``; thread-safe for reading. `sizes`, int64
    ``[shards]``, says how many numbers each shard takes; default: as many as it has samples."""

    def __init__(self, shards: Sequence[Shard], sizes: np.ndarray | None = None) -> None:
        self.shards = list(shards)
        self.sizes = np.array([len(shard.samples) for shard in self.shards], np.int64) if sizes is None else sizes
        self._ends = np.cumsum(self.sizes)
        self._files: dict[int, int] = {}  # shard -> descriptor, oldest first

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def counts(self) -> list[Counts | None]:
        """Of each shard, as of :attr:`~.index.Shard.counts`; None: it was not reached yet, and may be remote."""
        return [shard.counts for shard in self.shards]

    @property
    def samples(self) -> int:
        """The samples of the shards that are counted."""
        return sum(samples for samples, _, _ in filter(None, self.counts))

    @property
    def fingerprint(self) -> str:
        """What must be alike on all ranks."""
        return "".join(f"{s.path.name} {len(s.samples)} {s.broken} {len(s.joined.texts)}\n" for s in self.shards)

    @property
    def lost(self) -> int:
        """Samples that the indexes leave out. For a tar with missing parts: its difference from the mean of the whole
        tars, or its index's estimate if that is larger."""
        counts = list(filter(None, self.counts))
        whole = [samples for samples, _, damaged in counts if not damaged]
        mean = round(sum(whole) / len(whole)) if whole else 0
        return sum(max(broken, mean - samples if damaged else 0) for samples, broken, damaged in counts)

    @property
    def bad(self) -> list[Bad]:
        """What the indexes leave out."""
        return [bad for shard in self.shards if shard.broken for bad in shard.bad]

    def open_for(self, samples: np.ndarray) -> None:
        """Open the files that hold these samples, and close the ones unused for longest.

        Not thread-safe: call it before the :meth:`read` calls it serves, while no other is in flight.
        """
        needed = np.unique(np.searchsorted(self._ends, samples, side="right")).tolist()
        for shard in needed:
            descriptor = self._files.pop(shard, None)
            with contextlib.suppress(OSError):  # read raises for a shard that has vanished
                self._files[shard] = self.shards[shard].open() if descriptor is None else descriptor
        idle = [shard for shard in self._files if shard not in needed]
        away = [shard for shard in idle if self.shards[shard].evictable and not os.fstat(self._files[shard]).st_nlink]
        for shard in {*away, *idle[: max(0, len(self._files) - 64)]}:  # the disk keeps a removed file while it is open
            os.close(self._files.pop(shard))

    def read(self, number: int) -> Sample:
        """Sample `number`, after :meth:`open_for` has been called with it.

        Raises:
            OSError: the shard cannot be read, or has been cut since it was indexed.
            ValueError: no caption can be used.
        """
        shard, record = self._record(number)
        if shard not in self._files:
            raise OSError(f"{self.shards[shard].path} cannot be opened any more")
        # Its fields in the order of index.INDEX: one conversion costs less than a look-up of each by name.
        key, start, span, image_at, image_size, text_at, text_size, json_at, json_size = record.item()
        data = os.pread(self._files[shard], span, start)
        if len(data) < span:
            raise OSError(f"{self.shards[shard].path} is shorter than when it was indexed")
        captions = captions_of(data[text_at : text_at + text_size]) + self.shards[shard].joined.of(start)
        image, json = data[image_at : image_at + image_size], data[json_at : json_at + json_size]
        return Sample(key.decode(errors="replace"), image, captions, json)

    def alternatives(self, number: int) -> tuple[int, int]:
        """First and count of the samples of which one may replace sample `number`: all of the set."""
        return 0, len(self)

    def bad_sample(self, number: int, reason: str) -> Bad:
        shard, record = self._record(number)
        return Bad(str(self.shards[shard].path), record["key"].decode(errors="replace"), reason)

    def captions(self, limit: int | None = None) -> Iterator[str]:
        """All captions in order, or those of about `limit` samples spread evenly over the shards."""
        step = 1 if limit is None else max(1, -(-sum(len(shard.samples) for shard in self.shards) // limit))
        for shard in self.shards:
            with contextlib.suppress(OSError), os.fdopen(shard.open(), "rb") as file:
                for record in shard.samples[::step]:
                    with contextlib.suppress(ValueError):
                        yield from captions_of(read_member(file.fileno(), record, "text"))
                        yield from shard.joined.of(int(record["start"]))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _record(self, number: int) -> tuple[int, Any]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        start = self._ends[shard] - self.sizes[shard]
        return shard, self.shards[shard].samples[number - start]
