"""Where a build puts its shards, and the hidden folder that holds them until the last is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ...files import write_json, write_text
from .bad import Bad
from .index import index_places, report_places

PATTERN = re.compile(r"([^{}]*)\{(\d+)\.\.\}([^{}/]*\.tar)")


@dataclass(frozen=True)
class Target:
    """The names of a build's shards, and the hidden folder in which they wait."""

    first: int
    digits: int
    folder: Path
    before: str  # the shards' name up to their number
    after: str

    @classmethod
    def of(cls, pattern: str) -> Target:
        found = PATTERN.fullmatch(pattern)
        if found is None:
            raise UserError(
                f"--out {pattern}: expected a file name with one open range that ends in .tar, such as "
                f"'data/train-{{000000..}}.tar'"
            )
        before, digits, after = found.groups()
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
        """Make the hidden folder and lock it; afterwards remove it unless it holds an unfinished build."""
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
        """The report on a finished shard; None where it is not finished."""
        try:
            report = json.loads(self.part(number).with_suffix(".json").read_text())
        except (OSError, ValueError):
            return None
        part = self.part(number)
        published = (self.record() or {}).get("publishing")
        whole = part.stat().st_size == report["bytes"] if part.is_file() else published
        return report if whole else None

    def publish(self, arguments: dict, samples: Sequence[int], skipped: list[Bad]) -> list[Path]:
        """Give the shards their names and remove older shards of the pattern; shards without a sample are left out.

        It may be killed at any point; a second call completes it.
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
            write_text(self.skipped_list, "".join(f"{bad}\n" for bad in skipped))
        self.discard()
        return shards

    def clear(self) -> None:
        """Remove the remains of a build that was killed while it was cleaning up."""
        for path in self.hidden.iterdir():
            if path.name != "lock":
                path.unlink()

    def discard(self) -> None:
        # First the record: without it, the rest is not taken for an unfinished build.
        (self.hidden / "build.json").unlink(missing_ok=True)
        shutil.rmtree(self.hidden, ignore_errors=True)


def _forget(shard: Path) -> None:
    """Remove the index of a shard that is to be replaced."""
    for place in (*index_places(shard), *report_places(shard)):
        with contextlib.suppress(OSError):
            place.unlink()
