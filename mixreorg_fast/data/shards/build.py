"""Building shards from a source of photos and captions, by several processes; a killed build can be continued.

Shard k holds samples k·n … (k+1)·n - 1 of the source, without those that cannot be used. So its content depends on the
source alone: not on the number of processes, nor on interruptions. Finished shards wait in a hidden folder, and appear
under their names together when the last one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from ...files import json_or_empty, read_json, write_json, write_text
from . import photos
from .img2dataset import finished_tars
from .index import index_places, joined_places, report_places
from .pair import NounFinder, Pair, write_shard
from .parquet import rows_of_parquet
from .processes import advance, held, in_processes
from .scan import Bad
from .sources import Source

PATTERN = re.compile(r"([^{}]*)\{(\d+)\.\.\}([^{}/]*\.tar)")


@dataclass(frozen=True)
class Built:
    """What a build left."""

    shards: list[Path]
    samples: int
    skipped: list[Bad]
    skipped_list: Path  # the file that lists what was skipped, if anything was


def build(
    path: str | Path,
    out: str,
    *,
    nouns: str | Path | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
    **options: str | Path | None,
) -> Built:
    """Shards of photos beside text files or in a table, of Parquet files, or of img2dataset's output.

    Photos and lines that give no sample are left out and listed.

    Args:
        out: such as ``train-{000000..}.tar``; the braces give the first number and its digits.
        nouns: a file with one word or phrase per line; those found in a sample's captions become its ``nouns``.
        overwrite: replace the shards that the pattern has already, all of them.
        workers: processes; the shards are the same with any number.
        options: `split`, `images`, `image_column` and `caption_column`, if the source has them; see
            :func:`~.photos.listed` and :func:`~.parquet.rows_of_parquet`.

    Raises:
        UserError: the source is missing or malformed, nothing is left to write, shards of `out` exist already, or an
            unfinished build of `out` had other arguments.
    """
    target = Target(out)
    finder = None if nouns is None else NounFinder.of(nouns)
    with target.locked():
        old = target.existing()
        if old and not overwrite and not target.record():
            raise UserError(
                f"{min(old)} exists already ({len(old)} shards of {out}); "
                f"add --overwrite to replace them, or choose another --out"
            )
        source = _open(Path(path).expanduser(), {"workers": workers, **options})
        images = options.get("images")
        arguments = {
            "source": os.path.abspath(path),
            "files": _state_of(source.files),
            "samples": len(source.places),
            **options,
            "images": None if images is None else os.path.abspath(images),
            "nouns": None if finder is None else hashlib.sha256("\n".join(finder.nouns).encode()).hexdigest(),
            "samples_per_shard": samples_per_shard,
            "out": os.path.abspath(out),
        }
        target.begin(arguments)
        reports = _write_all(source, target, finder, samples_per_shard, workers, progress)
        samples = [report["samples"] for report in reports]
        skipped = [*source.left_out, *(Bad(*bad) for report in reports for bad in report["skipped"])]
        if not any(samples):
            target.discard()
            if not skipped:
                raise UserError(f"{path}: no samples")
            raise UserError(f"{path}: none of {len(skipped)} samples can be used: {skipped[0].reason} (and so on)")
        return Built(target.publish(samples, skipped), sum(samples), skipped, target.skipped_list)


def _open(path: Path, options: dict[str, Any]) -> Source:
    """The source at `path`, opened with `options`. Raises a :class:`UserError` for an option that its kind lacks."""
    kind, opener = _kind(path)
    known = inspect.signature(opener).parameters
    for name, value in options.items():
        if value is not None and name not in known and name != "workers":
            raise UserError(f"--{name.replace('_', '-')} {value}: not for {path}, which is {kind}")
    return opener(path, **{name: value for name, value in options.items() if name in known})


def _kind(path: Path) -> tuple[str, Callable[..., Source]]:
    """What the source at `path` is, told by the files there (see docs/data.md), and the function that opens it."""
    if not path.exists():
        raise UserError(f"no {path}{nearest(str(path), map(str, path.parent.glob('*')))}")
    if photos.table_of(path) is not None:
        return "a table of photos", photos.listed
    # img2dataset writes a table beside each of its tars, so tars come first.
    if any(path.glob("*.tar")):
        return "a folder of tars (img2dataset's)", finished_tars
    if photos.beside_texts(path).places:
        return "a folder of photos and text files", photos.beside_texts
    if any(path.rglob("*.parquet")) or (path.suffix == ".parquet" and path.is_file()):
        return "Parquet", rows_of_parquet
    raise UserError(
        f"{path}: nothing to build shards from; expected photos with a NAME.txt beside each NAME.jpg, a CSV (or a "
        f"folder with {' or '.join(photos.TABLES)}), Parquet files, or img2dataset's output (webdataset)"
    )


def _write_all(
    source: Source, target: Target, finder: NounFinder | None, per_shard: int, workers: int, progress: bool
) -> list[dict]:
    """Write the shards that are not there yet; returns the reports of all."""
    total = len(source.places)
    numbers = range(-(-total // per_shard))
    missing = [number for number in numbers if not target.report(number)]
    jobs = [(source.places[k * per_shard : (k + 1) * per_shard], target.part(k)) for k in missing]
    done = total - sum(len(places) for places, _ in jobs)
    bar = {"total": total, "initial": done, "unit": "photo", "desc": "build", "disable": not progress}
    for _ in in_processes(partial(_write_part, source.read, finder), jobs, workers, **bar):
        pass
    return [target.report(number) for number in numbers]


def _write_part(read: Callable, finder: NounFinder | None, job: tuple[Any, Path]) -> None:
    """Write one shard to the hidden folder, then its report."""
    places, path = job
    skipped: list[Bad] = []

    def pairs() -> Iterator[Pair]:
        for pair in read(places):
            advance(1)
            if isinstance(pair, Bad):
                skipped.append(pair)
            else:
                yield pair if finder is None else replace(pair, fields={"nouns": finder.find(pair.captions)})

    written = write_shard(path, pairs())
    write_json(path.with_suffix(".json"), {"samples": written, "bytes": path.stat().st_size, "skipped": skipped})


def _state_of(files: Sequence[Path]) -> str:
    """A digest of names, sizes and times."""
    states = ((path.name, path.stat()) for path in files)
    text = "".join(f"{name} {status.st_size} {status.st_mtime_ns}\n" for name, status in states)
    return hashlib.sha256(text.encode()).hexdigest()


class Target:
    """Names of a build's shards, from a pattern such as ``train-{000000..}.tar``, and the folder where they wait."""

    def __init__(self, pattern: str) -> None:
        found = PATTERN.fullmatch(os.path.expanduser(pattern))
        if found is None:
            raise UserError(
                f"--out {pattern}: expected a file name with one open range that ends in .tar, such as "
                f"'data/train-{{000000..}}.tar'"
            )
        before, digits, self._after = found.groups()
        folder, self._before = os.path.split(before)
        self._folder, self._first, self._digits = Path(folder or "."), int(digits), len(digits)
        name = (self._before + self._after.removesuffix(".tar")).strip("-_. ") or "shards"
        self.hidden = self._folder / f".{name}.building"
        self.skipped_list = self._folder / f"{name}.skipped.tsv"

    def part(self, number: int) -> Path:
        """The place of a shard until it gets its name."""
        return self.hidden / f"{number:08d}.tar"

    def existing(self) -> list[Path]:
        """Shards of the pattern."""
        shape = re.compile(re.escape(self._before) + rf"\d{{{self._digits},}}" + re.escape(self._after))
        return [path for path in self._folder.iterdir() if shape.fullmatch(path.name)]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the hidden folder and lock it; afterwards remove it unless it holds an unfinished build."""
        self.hidden.mkdir(parents=True, exist_ok=True)
        with held(self.hidden / "lock") as mine:
            if not mine:
                raise UserError(
                    f"{self.hidden}: another process is building these shards, or the disk has no file locks"
                )
            try:
                yield
            finally:
                if not self.record():
                    self.discard()

    def record(self) -> dict:
        """What ``build.json`` of an unfinished build says: `arguments`, and whether it was `publishing`; else {}."""
        try:
            return read_json(self.hidden / "build.json")
        except OSError:
            return {}
        except UserError:
            raise UserError(f"{self.hidden}: damaged; delete it to start the build again") from None

    def begin(self, arguments: dict[str, Any]) -> None:
        """Note the arguments of a build, or refuse those that an unfinished build did not have."""
        if not (unfinished := self.record()):
            for path in {*self.hidden.iterdir()} - {self.hidden / "lock"}:  # a build was killed while it cleaned up
                path.unlink()
            write_json(self.hidden / "build.json", {"arguments": arguments, "publishing": False})
        for name, value in unfinished.get("arguments", {}).items():
            if arguments.get(name) != value:
                what = "the source has changed since" if name in ("files", "samples") else f"it had {name} {value}"
                raise UserError(
                    f"{self.hidden} holds an unfinished build with other arguments ({what}); "
                    f"finish that one, or delete the folder"
                )

    def report(self, number: int) -> dict:
        """The report on a finished shard; {} where it is not finished."""
        part = self.part(number)
        report = json_or_empty(part.with_suffix(".json"))
        finished = part.stat().st_size == report.get("bytes") if part.is_file() else self.record().get("publishing")
        return report if finished else {}

    def publish(self, samples: Sequence[int], skipped: list[Bad]) -> list[Path]:
        """Give the shards their names and remove older shards of the pattern; shards without a sample are left out.

        It may be killed at any point; a second call completes it.
        """
        write_json(self.hidden / "build.json", {**self.record(), "publishing": True})
        shards = []
        for number in (number for number, count in enumerate(samples) if count):
            name = f"{self._before}{self._first + len(shards):0{self._digits}d}{self._after}"
            shards.append(self._folder / name)
            if self.part(number).is_file():
                _forget(shards[-1])
                os.replace(self.part(number), shards[-1])
        for old in set(self.existing()) - set(shards):
            _forget(old)
            old.unlink()
        self.skipped_list.unlink(missing_ok=True)
        if skipped:
            write_text(self.skipped_list, "".join(f"{bad}\n" for bad in skipped))
        self.discard()
        return shards

    def discard(self) -> None:
        # First the record: without it, the rest is not taken for an unfinished build.
        (self.hidden / "build.json").unlink(missing_ok=True)
        shutil.rmtree(self.hidden, ignore_errors=True)


def _forget(shard: Path) -> None:
    """Remove the index and the joined captions of a shard that is to be replaced."""
    for place in (*index_places(shard), *report_places(shard), *joined_places(shard)):
        with contextlib.suppress(OSError):
            place.unlink()
