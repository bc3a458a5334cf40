"""Captions that were joined to a shard after it was built, in ``SHARD.captions`` beside it.

The file begins with a line of JSON. A record per sample follows (its key, its place in the tar, the place and size of
its text), then the texts, a caption per line. The tar's size and the samples' keys and places tell whether the file
belongs to the present state of the tar.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class JoinedCaptions:
    """The further captions of a shard: `records` in order of `start`, and the `texts`, both mapped from their file."""

    records: np.ndarray
    texts: np.ndarray  # uint8 [bytes]

    def of(self, start: int) -> list[str]:
        """The further captions of the sample that begins at byte `start` of the tar."""
        place = int(np.searchsorted(self.records["start"], start))
        if place == len(self.records) or self.records["start"][place] != start:
            return []
        at, size = int(self.records["at"][place]), int(self.records["size"][place])
        return self.texts[at : at + size].tobytes().decode().split("\n")


def read_joined(place: Path, size: int | None, samples: np.ndarray) -> JoinedCaptions:
    """The captions in a file; a :class:`UserError` where it is damaged, or of another state of the tar.

    Args:
        size: of the tar, in bytes; None: the tar has vanished.
        samples: the tar's index.
    """
    try:
        with open(place, "rb") as file:
            line = file.readline(4096)
        header = json.loads(line)
        record, count = _record_type(header["key_bytes"]), header["count"]
        data = np.memmap(place, np.uint8, "r", len(line))
        ends = count * record.itemsize
        if header["format"] != FORMAT or len(data) != ends + header["text_bytes"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{place}: damaged; delete it and join the captions again") from None
    records = data[:ends].view(record)
    _, ours, theirs = np.intersect1d(records["start"], samples["start"], assume_unique=True, return_indices=True)
    if size not in (None, header["size"]) or (records["key"][ours] != samples["key"][theirs]).any():
        raise UserError(
            f"{place}: captions of another state of this shard, which has changed since; delete the file, or join again"
        )
    return JoinedCaptions(records, data[ends:])


def write_joined(place: Path, size: int, samples: Iterable[tuple[bytes, int, list[str]]]) -> None:
    """Write the file at `place`, not atomically.

    Args:
        size: of the tar, in bytes.
        samples: key, start and further captions (each without line breaks) of samples in order of start.
    """
    texts = [(key, start, "\n".join(captions).encode()) for key, start, captions in samples]
    records = np.zeros(len(texts), _record_type(max(len(key) for key, *_ in texts)))
    sizes = np.array([len(text) for *_, text in texts], np.int64)
    records["key"], records["start"] = [key for key, *_ in texts], [start for _, start, _ in texts]
    records["at"], records["size"] = sizes.cumsum() - sizes, sizes
    header = {"format": FORMAT, "size": size, "count": len(records), "key_bytes": records.dtype["key"].itemsize}
    with open(place, "wb") as file:
        file.write(json.dumps({**header, "text_bytes": int(sizes.sum())}).encode() + b"\n")
        file.write(records.tobytes())
        file.writelines(text for *_, text in texts)


def _record_type(key_bytes: int) -> np.dtype:
    return np.dtype([("key", f"S{key_bytes}"), ("start", "<i8"), ("at", "<i8"), ("size", "<i8")])
