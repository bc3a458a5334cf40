"""The index of a shard: key, place and size of each sample, from the tar's headers.

It is cached beside the shard, or in the user's cache folder where the shard's folder is read-only. A list of what it
leaves out (``SHARD.broken.tsv``, key TAB reason) lies beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...errors import UserError
from ...files import atomic_path, write_text
from .joined import JoinedCaptions
from .scan import Bad, LeftOut, scan

INDEX_FORMAT = 3


@dataclass(frozen=True)
class Shard:
    """A tar and its index: `samples` is a structured array (see ``_record_type``), mapped from the index file."""

    path: Path
    samples: np.ndarray
    verified: bool  # every photo was decoded when the index was made
    broken: int = 0  # samples that the index leaves out, estimated by their bytes where parts of the tar are missing
    problem: str | None = None  # why parts of the tar, or all of it, are missing
    gone: bool = False  # the tar has vanished since it was indexed
    joined: JoinedCaptions | None = None  # further captions, where the shards of a run are opened

    evictable: ClassVar[bool] = False  # the file may be removed, and comes back when it is opened

    def open(self) -> int:
        """A descriptor of the tar's file."""
        return os.open(self.path, os.O_RDONLY)

    @property
    def bad(self) -> list[Bad]:
        """What the index leaves out; one entry for all of it where the list is missing."""
        for place in report_places(self.path):
            with contextlib.suppress(OSError):
                lines = place.read_text(encoding="utf-8").splitlines()
                return [Bad(str(self.path), *line.split("\t", 1)) for line in lines if "\t" in line]
        if not self.broken:
            return []
        return [Bad(str(self.path), "", self.problem or f"samples left out: {self.broken}")]


def open_shard(path: Path) -> Shard:
    """A shard with its cached index, which is made where it is missing or older than the tar.

    Of a damaged tar the readable samples are indexed, of any other file none; ``problem`` says why.

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

    Args:
        status: the tar's, taken before it was scanned. A tar that changes meanwhile is scanned again.
    """
    array = np.zeros(len(samples), dtype=_record_type(max((len(s["key"]) for s in samples), default=1)))
    for name in array.dtype.names or ():
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
    return Shard(Path(path), array, **facts)


def index_places(path: Path) -> list[Path]:
    """Where the index of a shard may lie: beside it, or in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixreorg" / "shards"
    return [Path(f"{path}.index"), cache / f"{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]}.index"]


def report_places(path: Path) -> list[Path]:
    """Where the list of a shard's broken samples may lie, as :func:`index_places`."""
    return [place.with_suffix(".broken.tsv") for place in index_places(path)]


def joined_places(path: Path) -> list[Path]:
    """Where the captions that were joined to a shard may lie, as :func:`index_places`."""
    return [place.with_suffix(".captions") for place in index_places(path)]


def _load_index(path: Path, place: Path, status: os.stat_result | None) -> Shard | None:
    """The shard by the index file at `place`; None where that is missing, damaged or of a tar of another status.

    Args:
        status: of the tar; None: it has vanished, so any index of it fits.
    """
    try:
        with open(place, "rb") as file:
            line = file.readline(4096)
            header = json.loads(line)
            fits = header["format"] == INDEX_FORMAT and (
                status is None or (header["size"], header["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
            )
            record, count = _record_type(header["key_bytes"]), header["count"]
            if not fits or os.fstat(file.fileno()).st_size != len(line) + count * record.itemsize:
                return None
        # An empty file cannot be mapped.
        samples = np.memmap(place, record, "r", len(line), (count,)) if count else np.zeros(0, record)
        facts = {name: header[name] for name in ("verified", "broken", "problem")}
        return Shard(Path(path), samples, **facts, gone=status is None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_type(key_bytes: int) -> np.dtype:
    """One sample: `start` and `span` of its bytes in the tar; places of its members counted from `start`."""
    numbers = ("start", "span", "image_at", "image_size", "text_at", "text_size", "json_at", "json_size")
    return np.dtype([("key", f"S{key_bytes}"), *((name, "<i8") for name in numbers)])
