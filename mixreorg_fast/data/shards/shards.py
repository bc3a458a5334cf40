"""Reading WebDataset tar shards in place: patterns, an index per shard, and samples by number.

A sample is what shares a key (the file name up to its first dot) in consecutive members of the tar: an image
(``.jpg .jpeg .png .webp``), a ``.txt`` with one caption per line, and optionally a ``.json`` with ``nouns``. The index
of a shard (key, place and size of each member) comes from the tar's headers alone and is cached beside the shard, or
in the user's cache folder where that is not writable. Samples are then read with one ``pread`` each; no member is
ever written to disk.

What cannot be used never stops a reader: it is left out, counted and listed (:class:`Bad`).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError, nearest
from .tar import Members, NotTar

log = logging.getLogger("mixreorg_fast")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
INDEX_FORMAT = 3
# A member larger than this is no photo; reading it would only cost memory.
LARGEST_MEMBER = 256 << 20
# Pixels. A larger photo is refused: decoded, it would take over half a gigabyte (Pillow draws the same line).
LARGEST_PHOTO = 178_956_970
# Bytes of a line. More is a document rather than a caption: no text encoder here sees beyond its first hundredth.
LONGEST_CAPTION = 8192

# How to make the folders that this project's configurations name, as docs/data.md says.
RECIPES = {
    "data/flickr8k": (
        "mixreorg shards build ../shared/data/flickr8k --out 'data/flickr8k/train-{000000..}.tar' --split train "
        "(and once more with val in place of train)"
    ),
    "data/own": "mixreorg shards build FOLDER --out 'data/own/train-{000000..}.tar'",
    "data/voc2012_subset": 'ln -s "$(realpath ../shared/data/voc2012_subset)" data/voc2012_subset',
    "data/camvid": 'ln -s "$(realpath ../shared/data/camvid)" data/camvid',
    "data/scenes": "mixreorg shards scenes --out data/scenes",
}


class Bad(NamedTuple):
    """Something of a shard that cannot be used; an empty key stands for the shard itself or for a part of it."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        """``shard TAB key TAB reason`` on one line, whatever bytes a key is made of."""
        return "\t".join("".join(c if c.isprintable() else "\ufffd" for c in part) for part in self)


class LeftOut(NamedTuple):
    """What an index leaves out of a shard; the key is empty where whole parts of the tar are missing."""

    key: str
    reason: str
    samples: int = 1  # an estimate where the key is empty


@dataclass(frozen=True)
class Sample:
    """One image-text pair as it lies in its shard."""

    key: str
    image: bytes  # encoded
    captions: list[str]  # at least one
    nouns: list[str]


@dataclass(frozen=True)
class Shard:
    """A tar and its index: `samples` is a structured array (see ``_record_type``), mapped from the index file."""

    path: Path
    samples: np.ndarray
    verified: bool  # every photo was decoded when the index was made
    broken: int = 0  # samples that the index leaves out, estimated by their bytes where parts of the tar are missing
    problem: str | None = None  # why parts of the tar, or all of it, are missing
    gone: bool = False  # the tar has vanished since it was indexed

    @property
    def bad(self) -> list[Bad]:
        """What the index leaves out."""
        listed = []
        for place in report_places(self.path):
            with contextlib.suppress(OSError):
                lines = place.read_text(encoding="utf-8").splitlines()
                listed = [Bad(str(self.path), *line.split("\t", 1)) for line in lines if "\t" in line]
                break
        return listed or ([Bad(str(self.path), "", self.problem)] if self.problem else [])


def how_to_make(path: str | Path) -> str:
    """``"; make it with: COMMAND"`` when `path` lies in a folder that docs/data.md has a command for, else ``""``."""
    text = os.path.normpath(str(path)).replace(os.sep, "/")
    for folder, command in RECIPES.items():
        if re.search(rf"(^|/){folder}(/|$)", text):
            return f"; make it with: {command} (docs/data.md)"
    return ""


def expand(patterns: str | Sequence[str]) -> list[Path]:
    """Paths that brace patterns (``{000..123}``, ``{a,b}``), globs and comma-separated alternatives stand for.

    The order is that of the patterns; within a glob it is alphabetical. A path named twice counts once.

    Raises:
        UserError: a brace is not closed, a named file is missing, a glob matches nothing, or it is a URL.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    paths: dict[Path, None] = {}
    missing: list[str] = []
    for pattern in (part for whole in patterns for part in _split(whole)):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", pattern):
            raise UserError(
                f"{pattern}: shards are read in place from local paths; copy them first (such as `aws s3 sync`, "
                f"`gsutil rsync`, `wget`) or mount the bucket (such as `mount-s3`, `rclone mount`) and name that path"
            )
        found = []
        for name in _braces(pattern):
            name = os.path.expanduser(name)
            if glob.has_magic(name):
                # A shard that has vanished keeps its place, and so the order of a run, by the index it left behind.
                left = (match.removesuffix(".index") for match in glob.glob(f"{name}.index", recursive=True))
                matches = sorted({*glob.glob(name, recursive=True), *left})
                if not any(map(os.path.isfile, matches)):
                    raise UserError(f"no shard matches {name}{_nearby(name)}{how_to_make(name)}")
                found += matches
            elif os.path.isfile(name) or any(place.is_file() for place in index_places(Path(name))):
                found.append(name)
            else:
                missing.append(name)
        paths.update(dict.fromkeys(map(Path, found)))
    if not missing and paths and not any(map(os.path.isfile, paths)):
        missing = [str(path) for path in paths]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"no shard {missing[0]}{more}{_nearby(missing[0])}{how_to_make(missing[0])}")
    if not paths:
        raise UserError("no shards: the pattern is empty; expected something like 'data/train-{000000..000123}.tar'")
    return list(paths)


def open_shards(patterns: str | Sequence[str], *, warn: bool = True) -> ShardSet:
    """The shards of `patterns`, indexed; those that hold nothing to use are named in a warning and listed as bad.

    Raises:
        UserError: as :func:`expand`; no shard holds a sample.
    """
    shards = [open_shard(path) for path in expand(patterns)]
    if not any(len(shard.samples) for shard in shards):
        _refuse_empty(shards[0])
    for shard in shards if warn else ():
        if shard.gone:
            log.warning(
                "%s is gone; other samples stand in for its %d. To train without it, delete %s.index too",
                *(shard.path, len(shard.samples), shard.path),
            )
        elif shard.problem:
            log.warning("%s: %s; its %d whole samples are used", shard.path, shard.problem, len(shard.samples))
        elif not len(shard.samples):
            log.warning("%s holds no sample to use", shard.path)
    return ShardSet(shards)


def open_shard(path: Path) -> Shard:
    """A shard with its cached index, which is made where it is missing or older than the tar.

    A damaged tar has the samples that can be read, one that is no tar has none; ``problem`` says why.

    Raises:
        UserError: there is neither the tar nor an index of it.
    """
    shard = indexed(path)
    if shard is not None:
        return shard
    status = os.stat(path)
    return write_index(path, status, *scan(path), verified=False)


def indexed(path: Path) -> Shard | None:
    """A shard by its index alone; None where that is missing or older than the tar.

    Raises:
        UserError: there is neither the tar nor an index of it.
    """
    try:
        status = os.stat(path)
    except OSError:
        status = None
    for place in index_places(path):
        cached = _load_index(place, status)
        if cached is not None:
            samples, header = cached
            known = {name: header[name] for name in ("verified", "broken", "problem")}
            return Shard(Path(path), samples, **known, gone=status is None)
    if status is None:
        raise UserError(f"no shard {path}")
    return None


def _refuse_empty(shard: Shard) -> None:
    if shard.problem:
        raise UserError(f"{shard.path}: {shard.problem}")
    reason = "no sample of it can be used" if shard.verified else "no image with a .txt of the same name"
    raise UserError(f"{shard.path}: no samples ({reason}); expected pairs such as 0001.jpg + 0001.txt")


class ShardSet:
    """Samples of several shards under one number, 0 … ``len(self) - 1``; thread-safe for reading."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.sizes = np.array([len(shard.samples) for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self._files: dict[int, int] = {}  # shard -> descriptor, oldest first

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def lost(self) -> int:
        """Samples that the indexes leave out. A tar of which parts are missing has lost what it lacks to the mean of
        the others, or what its index says if that is more."""
        whole = [len(shard.samples) for shard in self.shards if not shard.problem]
        mean = round(sum(whole) / len(whole)) if whole else 0
        return sum(
            max(shard.broken, mean - len(shard.samples)) if shard.problem else shard.broken for shard in self.shards
        )

    @property
    def bad(self) -> list[Bad]:
        """What the indexes leave out."""
        return [bad for shard in self.shards if shard.broken for bad in shard.bad]

    def open_for(self, samples: np.ndarray) -> None:
        """Open the files that hold these samples, and close the ones unused for longest.

        Not thread-safe: call it before the :meth:`read` calls it serves, none of them in flight.
        """
        needed = np.unique(np.searchsorted(self._ends, samples, side="right")).tolist()
        for shard in needed:
            descriptor = self._files.pop(shard, None)
            with contextlib.suppress(OSError):  # one that has vanished is found out by read
                self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY) if descriptor is None else descriptor
        while len(self._files) > max(64, len(needed)):
            os.close(self._files.pop(next(iter(self._files))))

    def read(self, number: int) -> Sample:
        """Sample `number`, after :meth:`open_for` has been called with it.

        Raises:
            OSError: the shard cannot be read, or has been cut since it was indexed.
            ValueError: it has no caption to use.
        """
        shard, record = self._record(number)
        if shard not in self._files:
            raise OSError(f"{self.shards[shard].path} cannot be opened any more")
        data = os.pread(self._files[shard], int(record["span"]), int(record["start"]))
        if len(data) < record["span"]:
            raise OSError(f"{self.shards[shard].path} is shorter than when it was indexed")
        return _sample(record, data)

    def bad_sample(self, number: int, reason: str) -> Bad:
        shard, record = self._record(number)
        return Bad(str(self.shards[shard].path), record["key"].decode(errors="replace"), reason)

    def captions(self, limit: int | None = None) -> Iterator[str]:
        """All captions in order, or those of about `limit` samples spread evenly over the shards."""
        step = 1 if limit is None else max(1, -(-len(self) // limit))
        for shard in self.shards:
            with contextlib.suppress(OSError), open(shard.path, "rb") as file:
                for record in shard.samples[::step]:
                    file.seek(int(record["start"] + record["text_at"]))
                    with contextlib.suppress(ValueError):
                        yield from captions_of(file.read(int(record["text_size"])))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _record(self, number: int) -> tuple[int, np.void]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        start = self._ends[shard] - self.sizes[shard]
        return shard, self.shards[shard].samples[number - start]


def scan(path: Path) -> tuple[list[dict], list[LeftOut]]:
    """Samples of a tar from its headers, a dictionary of index fields each; and what lacks something or is lost."""
    samples: list[dict] = []
    left_out: list[LeftOut] = []
    if not os.path.getsize(path):
        return samples, [LeftOut("", "empty file; expected a tar of images and captions")]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] == b"\x1f\x8b":
            reason = "compressed tar; shards are read in place, so expand it first with gunzip"
            return samples, [LeftOut("", reason)]
        members = Members(data)
        try:
            keyed = ((*_split_name(name), offset, size) for name, offset, size in members)
            for key, group in itertools.groupby(keyed, key=lambda member: member[0]):
                sample = _group(key, {extension: (offset, size) for _, extension, offset, size in group})
                if isinstance(sample, str):
                    left_out.append(LeftOut(key.decode(errors="replace"), sample))
                elif sample is not None:
                    samples.append(sample)
        except NotTar:
            return [], [LeftOut("", "not a tar file; expected a tar of images and captions")]
        readable = len(data) - sum(lost.size for lost in members.lost)
    for lost in members.lost:
        left_out.append(LeftOut("", lost.reason, max(1, round(lost.size * len(samples) / max(readable, 1)))))
    return samples, left_out


def write_index(
    path: Path,
    status: os.stat_result,
    samples: list[dict],
    left_out: Sequence[LeftOut],
    *,
    verified: bool,
) -> Shard:
    """Store an index atomically beside the shard, else in the cache folder, and a list of what it leaves out
    (``SHARD.broken.tsv``, key TAB reason).

    `status` is the tar's, taken before it was scanned, so that a tar that changes meanwhile is scanned again.
    """
    array = np.zeros(len(samples), dtype=_record_type(max((len(s["key"]) for s in samples), default=1)))
    for name in array.dtype.names:
        array[name] = [sample[name] for sample in samples]
    broken = sum(entry.samples for entry in left_out)
    problem = "; ".join(entry.reason for entry in left_out if not entry.key) or None
    header = {
        "format": INDEX_FORMAT,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "count": len(array),
        "key_bytes": array.dtype["key"].itemsize,
        "verified": verified,
        "broken": broken,
        "problem": problem,
    }
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"  # records start aligned
    listed = "".join(f"{Bad('', key, reason)}\n".removeprefix("\t") for key, reason, _ in left_out)
    for place, report in zip(index_places(path), report_places(path), strict=True):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if listed:
                write_atomically(report, lambda temporary: temporary.write_text(listed, encoding="utf-8"))
            else:
                report.unlink(missing_ok=True)
            write_atomically(place, lambda temporary: temporary.write_bytes(line + array.tobytes()))
            return Shard(Path(path), _load_index(place, status)[0], verified, broken, problem)
        except OSError:
            continue  # nowhere at all: this process indexes again next time
    return Shard(Path(path), array, verified, broken, problem)


def report_places(path: Path) -> tuple[Path, Path]:
    """Where the list of a shard's broken samples may lie, as :func:`index_places`."""
    beside, cached = index_places(path)
    return Path(f"{path}.broken.tsv"), cached.with_suffix(".broken.tsv")


def index_places(path: Path) -> tuple[Path, Path]:
    """Where the index of a shard may lie: beside it, or in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixreorg" / "shards"
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]
    return Path(f"{path}.index"), cache / f"{name}.index"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; nothing is left behind when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_index(place: Path, status: os.stat_result | None) -> tuple[np.ndarray, dict] | None:
    """An index file's records (mapped) and header, or None where it is missing, damaged or of another tar.

    A `status` of None asks for no particular tar.
    """
    try:
        with open(place, "rb") as file:
            line = file.readline(4096)
            header = json.loads(line)
            fits = header["format"] == INDEX_FORMAT and (
                status is None or (header["size"], header["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
            )
            record = _record_type(header["key_bytes"])
            if not fits or os.fstat(file.fileno()).st_size != len(line) + header["count"] * record.itemsize:
                return None
        if not header["count"]:
            return np.zeros(0, record), header
        return np.memmap(place, record, mode="r", offset=len(line), shape=(header["count"],)), header
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_type(key_bytes: int) -> np.dtype:
    """One sample: `start` and `span` of its bytes in the tar; places of its members counted from `start`."""
    numbers = ("start", "span", "image_at", "image_size", "text_at", "text_size", "json_at", "json_size")
    return np.dtype([("key", f"S{key_bytes}"), *((name, "<i8") for name in numbers)])


def _split_name(name: bytes) -> tuple[bytes, str]:
    """WebDataset's rule: the key is the path up to the first dot of the file name, the extension what follows."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, extension = file.partition(b".")
    return folder + slash + stem, extension.decode(errors="replace").lower()


def _group(key: bytes, members: dict[str, tuple[int, int]]) -> dict | str | None:
    """Index fields of one sample, or what it lacks; None for what was not meant as one (neither image nor text)."""
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    text = members.get("txt")
    if image is None and text is None:
        return None
    if image is None:
        return f"no image ({', '.join('.' + extension for extension in IMAGE_EXTENSIONS)})"
    if text is None:
        return "no caption (.txt)"
    nouns = members.get("json", (text[0], 0))
    start = min(offset for offset, _ in (image, text, nouns))
    span = max(offset + size for offset, size in (image, text, nouns)) - start
    if span > LARGEST_MEMBER:
        return f"{span} bytes, more than {LARGEST_MEMBER}"
    places = {}
    for name, (offset, size) in {"image": image, "text": text, "json": nouns}.items():
        places |= {f"{name}_at": offset - start, f"{name}_size": size}
    return {"key": key, "start": start, "span": span, **places}


def _sample(record: np.void, data: bytes) -> Sample:
    """A sample from the bytes of its span."""

    def member(name: str) -> bytes:
        at = int(record[f"{name}_at"])
        return data[at : at + int(record[f"{name}_size"])]

    return Sample(
        record["key"].decode(errors="replace"), member("image"), captions_of(member("text")), _nouns(member("json"))
    )


def captions_of(text: bytes) -> list[str]:
    """The captions of a ``.txt``, one per line, without the lines that are of no use.

    Raises:
        ValueError: there is none to use; the message says why.
    """
    usable, reason = [], "empty caption"
    for line in text.splitlines():
        try:
            caption = line.decode().strip()
        except UnicodeDecodeError:
            reason = "caption is not UTF-8"
            continue
        if len(line) > LONGEST_CAPTION:
            reason = f"caption of {len(line)} bytes, more than {LONGEST_CAPTION}"
        elif caption:
            usable.append(caption)
    if not usable:
        raise ValueError(reason)
    return usable


def _nouns(text: bytes) -> list[str]:
    """The ``nouns`` of a sample's json; anything else in its place counts as none."""
    try:
        nouns = json.loads(text).get("nouns", []) if text else []
    except (ValueError, AttributeError):
        return []
    if not isinstance(nouns, list):
        return []
    return [noun for noun in nouns if isinstance(noun, str) and len(noun) <= LONGEST_CAPTION]


def _split(pattern: str) -> list[str]:
    """Parts of a pattern between the commas that stand outside of braces."""
    parts, depth = [""], 0
    for character in pattern:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            break
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UserError(
            f"pattern {pattern}: braces do not match; expected something like 'train-{{000000..000123}}.tar'"
        )
    return [part.strip() for part in parts if part.strip()]


def _braces(pattern: str) -> list[str]:
    """A pattern's brace expressions written out; ``{008..011}`` keeps its leading zeros."""
    found = re.search(r"\{([^{}]*)\}", pattern)  # an innermost one
    if not found:
        return [pattern]
    inside = found[1]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = map(int, numbers.groups())
        if last < first or last - first >= 10_000_000:
            raise UserError(f"pattern {pattern}: {{{inside}}} is no rising range")
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise UserError(
            f"pattern {pattern}: {{{inside}}} is neither a range such as {{000000..000123}} nor a list {{a,b}}"
        )
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in _braces(before + choice + after)]


def _nearby(name: str) -> str:
    """The closest existing tar in the folder of a missing one."""
    folder = os.path.dirname(name) or "."
    if glob.has_magic(folder) or not os.path.isdir(folder):
        return ""
    siblings = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    return (
        nearest(name, siblings) if len(siblings) > 3 else (f" (there are: {', '.join(siblings)})" if siblings else "")
    )
