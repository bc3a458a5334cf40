"""Where a build puts its shards, and the hidden folder that holds them until the last is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import write_json, write_text
from .index import index_places, joined_places, report_places
from .scan import Bad

PATTERN = re.compile(r"([^{}]*)\{(\d+)\.\.\}([^{}/]*\.tar)")


class Target:
    """The names of a build's shards, and the hidden folder in which they wait.

    Args:
        pattern: such as ``data/train-{000000..}.tar``.

    Attributes:
        hidden: the folder.
        skipped_list: the file that lists what was skipped.

    Raises:
        UserError: the pattern is malformed.
    """

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
        return [p for p in self._folder.iterdir() if shape.fullmatch(p.name)] if self._folder.is_dir() else []

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
        """What ``build.json`` of an unfinished build says: its `arguments`, and whether it was `publishing`."""
        try:
            return json.loads((self.hidden / "build.json").read_text())
        except OSError:
            return None
        except ValueError:
            raise UserError(f"{self.hidden}: damaged; delete it to start the build again") from None

    def begin(self, arguments: dict[str, Any]) -> None:
        """Note the arguments of a build, or continue the unfinished build that had the same.

        Raises:
            UserError: the unfinished build had other arguments.
        """
        unfinished = self.record()
        if unfinished is None:
            for path in self.hidden.iterdir():  # remains of a build that was killed while it was cleaning up
                if path.name != "lock":
                    path.unlink()
            return write_json(self.hidden / "build.json", {"arguments": arguments, "publishing": False})
        for name, value in unfinished["arguments"].items():
            if arguments.get(name) != value:
                what = "the source has changed since" if name in ("files", "samples") else f"it had {name} {value}"
                raise UserError(
                    f"{self.hidden} holds an unfinished build with other arguments ({what}); "
                    f"finish that one, or delete the folder"
                )
        return None

    def report(self, number: int) -> dict | None:
        """The report on a finished shard; None where it is not finished."""
        part = self.part(number)
        try:
            report = json.loads(part.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return None
        published = (self.record() or {}).get("publishing")
        return report if (part.stat().st_size == report["bytes"] if part.is_file() else published) else None

    def publish(self, samples: Sequence[int], skipped: list[Bad]) -> list[Path]:
        """Give the shards their names and remove older shards of the pattern; shards without a sample are left out.

        It may be killed at any point; a second call completes it.
        """
        write_json(self.hidden / "build.json", {**(self.record() or {}), "publishing": True})
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
