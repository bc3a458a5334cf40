"""What lies beside a shard: its index, and the captions that were joined to it after it was built.

Both files begin with a line of JSON, and a record per sample follows. ``SHARD.index`` holds the key of each sample and
the places and sizes of its members, from the tar's headers; ``SHARD.broken.tsv`` lists what the index leaves out (key
TAB reason). In ``SHARD.captions`` the texts follow, a caption per line. The tar's size and the samples' keys and places
tell whether they belong to the present state of the tar. Where the shard's folder is read-only, the files lie in the
user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...files import atomic_path, write_text
from .scan import Bad, LeftOut, scan

INDEX_FORMAT, JOINED_FORMAT = 3, 1
# The numbers of a record. Places in the tar are counted from the sample's `start`, those of texts from the first text.
INDEX = ("start", "span", "image_at", "image_size", "text_at", "text_size", "json_at", "json_size")
JOINED = ("start", "at", "size")
DAMAGE = (OSError, ValueError, KeyError, TypeError)
Counts = tuple[int, int, bool]


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


NO_CAPTIONS = JoinedCaptions(np.zeros(0, [("start", np.int64)]), np.zeros(0, np.uint8))


@dataclass(frozen=True)
class Shard:
    """A tar and its index: `samples` is a structured array (its numbers: `INDEX`), mapped from the index file."""

    path: Path
    samples: np.ndarray
    verified: bool  # every photo was decoded when the index was made
    broken: int = 0  # samples that the index leaves out, estimated by their bytes where parts of the tar are missing
    problem: str | None = None  # why parts of the tar, or all of it, are missing
    gone: bool = False  # the tar has vanished since it was indexed
    joined: JoinedCaptions = NO_CAPTIONS  # set by :func:`with_captions`

    evictable: ClassVar[bool] = False  # the file may be removed, and comes back when it is opened

    def open(self) -> int:
        """A descriptor of the tar's file."""
        return os.open(self.path, os.O_RDONLY)

    @property
    def counts(self) -> Counts:
        """Its samples, the broken ones that its index leaves out, whether parts of it are missing."""
        return len(self.samples), self.broken, bool(self.problem)

    @property
    def bad(self) -> list[Bad]:
        """What the index leaves out; one entry for all of it where the list is missing."""
        for place in report_places(self.path):
            with contextlib.suppress(OSError):
                lines = place.read_text(encoding="utf-8").splitlines()
                return [Bad(str(self.path), *line.split("\t", 1)) for line in lines if "\t" in line]
        reason = self.problem or f"samples left out: {self.broken}"
        return [Bad(str(self.path), "", reason)] if self.broken else []


def index_places(path: Path, suffix: str = ".index") -> list[Path]:
    """Where the index of a shard may lie: beside it, or in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixreorg" / "shards"
    digest = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()
    return [Path(f"{path}{suffix}"), cache / f"{digest[:32]}{suffix}"]


# Where the list of a shard's broken samples, and the captions that were joined to it, may lie.
report_places = functools.partial(index_places, suffix=".broken.tsv")
joined_places = functools.partial(index_places, suffix=".captions")


def open_shard(path: Path) -> Shard:
    """A shard with its cached index, which is made where it is missing or older than the tar.

    If the tar is damaged, its readable samples are indexed; a file that is not a tar has none. ``problem`` says why.

    Raises:
        UserError: there is neither the tar nor an index of it.
    """
    return indexed(path) or write_index(path, os.stat(path), *scan(path), verified=False)


def indexed(path: Path) -> Shard | None:
    """As :func:`open_shard`, but None where the index is missing or older than the tar."""
    status = os.stat(path) if os.path.exists(path) else None
    shard = next(filter(None, (_load_index(path, place, status) for place in index_places(path))), None)
    if shard is None and status is None:
        raise UserError(f"no shard {path}")
    return shard


def write_index(
    path: Path, status: os.stat_result, samples: list[dict], left_out: Sequence[LeftOut], *, verified: bool
) -> Shard:
    """Store an index, and a list of what it leaves out, beside the shard, else in the cache folder.

    `status` is the tar's, taken before it was scanned. A tar that changes meanwhile is scanned again.
    """
    array = np.zeros(len(samples), _record_type(max((len(s["key"]) for s in samples), default=1), INDEX))
    for name in ("key", *INDEX):
        array[name] = [sample[name] for sample in samples]
    facts = {
        "verified": verified,
        "broken": sum(entry.samples for entry in left_out),
        "problem": "; ".join(entry.reason for entry in left_out if not entry.key) or None,
    }
    header = {"format": INDEX_FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "count": len(array)}
    line = json.dumps({**header, "key_bytes": array.dtype["key"].itemsize, **facts}).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"  # records start aligned
    listed = "".join(f"{Bad('', key, reason)}\n".removeprefix("\t") for key, reason, _ in left_out)
    for place, report in zip(index_places(path), report_places(path), strict=True):
        with contextlib.suppress(OSError):
            if listed:
                write_text(report, listed)
            else:
                report.unlink(missing_ok=True)
            with atomic_path(place) as temporary:
                temporary.write_bytes(line + array.tobytes())
            if (shard := _load_index(path, place, status)) is not None:
                return shard
    # Neither place can be written: the next process scans again.
    return Shard(path, array, **facts)


def with_captions(shard: Shard) -> Shard:
    """A shard with the captions that were joined to it, if there are some.

    Raises:
        UserError: their file is damaged, or of another state of the tar.
    """
    place = next(filter(Path.is_file, joined_places(shard.path)), None)
    if place is None:
        return shard
    try:
        header, records, texts = _read_records(place, JOINED_FORMAT, JOINED)
    except DAMAGE:
        raise UserError(f"{place}: damaged; delete it and join the captions again") from None
    changed = not shard.gone and os.path.getsize(shard.path) != header["size"]
    _, ours, theirs = np.intersect1d(records["start"], shard.samples["start"], assume_unique=True, return_indices=True)
    if changed or (records["key"][ours] != shard.samples["key"][theirs]).any():
        raise UserError(
            f"{place}: captions of another state of this shard, which has changed since; delete the file, or join again"
        )
    return replace(shard, joined=JoinedCaptions(records, texts))


def write_joined(place: Path, size: int, samples: Iterable[tuple[bytes, int, list[str]]]) -> None:
    """Write the captions that are joined to a tar of `size` bytes, not atomically. `samples` are key, start and further
    captions (each without line breaks) of samples in order of start."""
    texts = [(key, start, "\n".join(captions).encode()) for key, start, captions in samples]
    records = np.zeros(len(texts), _record_type(max(len(key) for key, *_ in texts), JOINED))
    sizes = np.array([len(text) for *_, text in texts], np.int64)
    records["key"], records["start"] = [key for key, *_ in texts], [start for _, start, _ in texts]
    records["at"], records["size"] = sizes.cumsum() - sizes, sizes
    header = {"format": JOINED_FORMAT, "size": size, "count": len(records), "key_bytes": records.dtype["key"].itemsize}
    with open(place, "wb") as file:
        file.write(json.dumps({**header, "text_bytes": int(sizes.sum())}).encode() + b"\n")
        file.write(records.tobytes())
        file.writelines(text for *_, text in texts)


def _load_index(path: Path, place: Path, status: os.stat_result | None) -> Shard | None:
    """The shard by the index file at `place`; None where that is missing, damaged or of a tar of another `status`. A
    tar without a status has vanished, and any index of it fits."""
    try:
        header, samples, _ = _read_records(place, INDEX_FORMAT, INDEX)
        if status is not None and (header["size"], header["mtime_ns"]) != (status.st_size, status.st_mtime_ns):
            return None
        facts = {name: header[name] for name in ("verified", "broken", "problem")}
    except DAMAGE:
        return None
    return Shard(path, samples, **facts, gone=status is None)


def _read_records(place: Path, format: int, numbers: Sequence[str]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Header, records and texts of a file, the latter two mapped; one of `DAMAGE` is raised where it is not whole."""
    with open(place, "rb") as file:
        line = file.readline(4096)
        # An empty stretch cannot be mapped.
        data = np.memmap(file, np.uint8, "r", len(line)) if file.peek(1) else np.zeros(0, np.uint8)
    header = json.loads(line)
    record = _record_type(header["key_bytes"], numbers)
    ends = header["count"] * record.itemsize
    if header["format"] != format or len(data) != ends + header.get("text_bytes", 0):
        raise ValueError
    return header, data[:ends].view(record), data[ends:]


def _record_type(key_bytes: int, numbers: Sequence[str]) -> np.dtype:
    return np.dtype([("key", f"S{key_bytes}"), *((name, "<i8") for name in numbers)])
