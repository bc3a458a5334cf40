"""Writing shards from a source of photos and captions, in parallel, and so that a killed build can go on.

Shard k holds samples k·n … (k+1)·n - 1 of the source, without those that are of no use. So what it holds depends on
nothing but the source: not on the number of processes, nor on interruptions. Finished shards wait in a hidden folder,
and appear under their names together when the last is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...files import write_json
from .processes import advance, pool
from .shards import Bad, index_places, report_places, write_atomically
from .sources import NounFinder, Pair, Source, open_source, read_nouns

OPEN_RANGE = re.compile(r"\{(\d+)\.\.\}")


@dataclass(frozen=True)
class Built:
    """What a build left."""

    shards: list[Path]
    samples: int
    skipped: list[Bad]
    skipped_list: Path  # holds them, if there are any

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why samples were skipped and how many, the most frequent first."""
        return Counter(bad.reason for bad in self.skipped).most_common()


def write_shard(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one tar; it appears under its name when it is whole. Repeated keys get a number appended."""

    def write(temporary: Path) -> None:
        keys: Counter[str] = Counter()
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for pair in pairs:
                keys[pair.key] += 1
                if keys[pair.key] > 1:  # members with the same name would be taken for one sample
                    pair = replace(pair, key=f"{pair.key}-{keys[pair.key]}")
                _append(tar, pair)

    write_atomically(path, write)


def build(
    path: str | Path,
    out: str,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    nouns: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> Built:
    """Shards of photos beside text files or in a table, of Parquet files, or of img2dataset's output.

    What gives no sample is left out and listed. `split`, `images` and the columns are those of
    :func:`~.sources.open_source`.

    Args:
        out: such as ``train-{000000..}.tar``; the braces give the first number and its digits.
        nouns: a file with one word or phrase per line; those found in a sample's captions become its ``nouns``.
        overwrite: replace the shards that the pattern has already, all of them.
        workers: processes; the shards are the same with any number.

    Raises:
        UserError: the source is missing or malformed, nothing is left to write, shards of `out` exist already, or an
            unfinished build of `out` had other arguments.
    """
    target = _Target.of(out)
    found = None if nouns is None else read_nouns(nouns)
    with target.locked():
        unfinished = target.record()
        if unfinished is None and target.existing() and not overwrite:
            old = target.existing()
            raise UserError(
                f"{min(old)} exists already ({len(old)} shards of {out}); "
                f"add --overwrite to replace them, or choose another --out"
            )
        columns = {"image_column": image_column, "caption_column": caption_column}
        source = open_source(path, split=split, images=images, workers=workers, **columns)
        arguments = {
            "source": os.path.abspath(path),
            "files": _state_of(source.files()),
            "samples": len(source),
            "split": split,
            "images": None if images is None else os.path.abspath(images),
            "nouns": None if found is None else hashlib.sha256("\n".join(found).encode()).hexdigest(),
            **columns,
            "samples_per_shard": samples_per_shard,
            "out": os.path.abspath(out),
        }
        _check_same(unfinished, arguments, target)
        if unfinished is None:
            target.clear()
            write_json(target.hidden / "build.json", {"arguments": arguments, "publishing": False})
        reports = _write_all(source, target, NounFinder(found) if found else None, samples_per_shard, workers, progress)
        samples = sum(report["samples"] for report in reports)
        skipped = [*source.left_out, *(Bad(*bad) for report in reports for bad in report["skipped"])]
        if not samples:
            target.discard()
            raise UserError(f"{path}: none of {len(skipped)} samples can be used: {skipped[0].reason} (and so on)")
        shards = target.publish(arguments, [report["samples"] for report in reports], skipped)
        return Built(shards, samples, skipped, target.skipped_list)


def _write_all(
    source: Source, target: _Target, finder: NounFinder | None, per_shard: int, workers: int, progress: bool
) -> list[dict]:
    """Write the shards that are not there yet; returns the reports of all."""
    jobs, done = [], 0
    for number, first in enumerate(range(0, len(source), per_shard)):
        part = source[first : first + per_shard]
        if target.report(number) is None:
            jobs.append((part, target.part(number), finder))
        else:
            done += len(part)
    with (
        tqdm(total=len(source), initial=done, unit="photo", desc="build", disable=not progress) as bar,
        pool(min(workers, max(len(jobs), 1)), bar) as run,
    ):
        for _ in run(_write_part, jobs):
            pass
    return [target.report(number) for number in range(-(-len(source) // per_shard))]


def _write_part(job: tuple[Source, Path, NounFinder | None]) -> None:
    """Write one shard to the hidden folder, then its report."""
    source, path, finder = job
    written, skipped = 0, []

    def pairs() -> Iterator[Pair]:
        nonlocal written
        for pair in source:
            advance(1)
            if isinstance(pair, Bad):
                skipped.append(pair)
                continue
            written += 1
            yield pair if finder is None else replace(pair, fields={"nouns": finder.find(pair.captions)})

    write_shard(path, pairs())
    report = {"samples": written, "bytes": path.stat().st_size, "skipped": skipped}
    write_json(path.with_suffix(".json"), report)


@dataclass(frozen=True)
class _Target:
    """Where a build puts its shards, and the hidden folder in which they wait."""

    first: int
    digits: int
    folder: Path
    before: str  # the shards' name up to their number
    after: str

    @classmethod
    def of(cls, pattern: str) -> _Target:
        ranges = list(OPEN_RANGE.finditer(pattern))
        if len(ranges) != 1 or "/" in pattern[ranges[0].end() :]:
            raise UserError(
                f"--out {pattern}: expected one open range in the file name, such as 'data/train-{{000000..}}.tar'"
            )
        digits = ranges[0][1]
        before, after = pattern[: ranges[0].start()], pattern[ranges[0].end() :]
        if not after.endswith(".tar"):
            raise UserError(
                f"--out {pattern}: expected a name that ends in .tar, such as 'data/train-{{000000..}}.tar'"
            )
        folder, before = os.path.split(os.path.expanduser(before))
        return cls(int(digits), len(digits), Path(folder or "."), before, after)

    @property
    def name(self) -> str:
        """The shards' name without their numbers."""
        return (self.before + self.after.removesuffix(".tar")).strip("-_. ") or "shards"

    @property
    def hidden(self) -> Path:
        return self.folder / f".{self.name}.building"

    @property
    def skipped_list(self) -> Path:
        return self.folder / f"{self.name}.skipped.tsv"

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.before}{self.first + number:0{self.digits}d}{self.after}"

    def part(self, number: int) -> Path:
        return self.hidden / f"{number:08d}.tar"

    def existing(self) -> list[Path]:
        """Shards of the pattern."""
        shape = re.compile(re.escape(self.before) + rf"\d{{{self.digits},}}" + re.escape(self.after))
        return [p for p in self.folder.iterdir() if shape.fullmatch(p.name)] if self.folder.is_dir() else []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the hidden folder and keep other builds out of it; nothing but an unfinished build is left of it."""
        self.hidden.mkdir(parents=True, exist_ok=True)
        with open(self.hidden / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.hidden}: another process is building these shards") from None
            try:
                yield
            finally:
                if self.hidden.is_dir() and self.record() is None:
                    self.discard()

    def record(self) -> dict | None:
        """What ``build.json`` of an unfinished build says."""
        try:
            return json.loads((self.hidden / "build.json").read_text())
        except OSError:
            return None
        except ValueError:
            raise UserError(f"{self.hidden}: damaged; delete it to build anew") from None

    def report(self, number: int) -> dict | None:
        """What is noted of a finished shard."""
        try:
            report = json.loads(self.part(number).with_suffix(".json").read_text())
        except (OSError, ValueError):
            return None
        part = self.part(number)
        published = (self.record() or {}).get("publishing")
        whole = part.stat().st_size == report["bytes"] if part.is_file() else published
        return report if whole else None

    def publish(self, arguments: dict, samples: Sequence[int], skipped: list[Bad]) -> list[Path]:
        """Give the shards their names, in place of what was there; those without a sample are left out.

        It may be killed anywhere: repeating it does what is left to do.
        """
        write_json(self.hidden / "build.json", {"arguments": arguments, "publishing": True})
        parts = [number for number, count in enumerate(samples) if count]
        shards = [self.shard(place) for place in range(len(parts))]
        for number, shard in zip(parts, shards, strict=True):
            if self.part(number).is_file():
                _forget(shard)
                os.replace(self.part(number), shard)
        for old in set(self.existing()) - set(shards):
            _forget(old)
            old.unlink()
        self.skipped_list.unlink(missing_ok=True)
        if skipped:
            text = "".join(f"{bad}\n" for bad in skipped)
            write_atomically(self.skipped_list, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.discard()
        return shards

    def clear(self) -> None:
        """Remove what a build left that was killed while it was cleaning up."""
        for path in self.hidden.iterdir():
            if path.name != "lock":
                path.unlink()

    def discard(self) -> None:
        # The record goes first: without it, what is left is no unfinished build.
        (self.hidden / "build.json").unlink(missing_ok=True)
        shutil.rmtree(self.hidden, ignore_errors=True)


def _check_same(unfinished: dict | None, arguments: dict, target: _Target) -> None:
    before = {} if unfinished is None else unfinished["arguments"]
    for name, value in before.items():
        if arguments.get(name) != value:
            what = "the source has changed since" if name in ("files", "samples") else f"it had {name} {value}"
            raise UserError(
                f"{target.hidden} holds an unfinished build with other arguments ({what}); "
                f"finish that one, or delete the folder"
            )


def _state_of(files: Sequence[Path]) -> str:
    """A digest of names, sizes and times."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _forget(shard: Path) -> None:
    """Remove what was noted of a shard that is to be replaced."""
    for place in (*index_places(shard), *report_places(shard)):
        with contextlib.suppress(OSError):
            place.unlink()


def _append(tar: tarfile.TarFile, pair: Pair) -> None:
    text = "\n".join(" ".join(caption.split()) for caption in pair.captions)
    members = {pair.extension: pair.image, "txt": text.encode()}
    if pair.fields is not None:
        members["json"] = json.dumps(pair.fields, ensure_ascii=False).encode()
    for extension, data in members.items():
        # No times, owners or modes of this machine: the same samples give the same bytes.
        info = tarfile.TarInfo(f"{pair.key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
