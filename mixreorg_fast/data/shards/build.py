"""Building shards from a source of photos and captions, by several processes; a killed build can be continued.

Shard k holds samples k·n … (k+1)·n - 1 of the source, without those that cannot be used. So its content depends on the
source alone: not on the number of processes, nor on interruptions. Finished shards wait in a hidden folder, and appear
under their names together when the last one is complete.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...files import write_json
from .bad import Bad
from .captions import NounFinder, read_nouns
from .pair import Pair
from .processes import advance, pool
from .sources import Source, open_source
from .target import Target
from .write import write_shard


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
        options: of the source, as :func:`~.sources.open_source`.

    Raises:
        UserError: the source is missing or malformed, nothing is left to write, shards of `out` exist already, or an
            unfinished build of `out` had other arguments.
    """
    target = Target.of(out)
    found = None if nouns is None else read_nouns(nouns)
    with target.locked():
        unfinished = target.record()
        old = target.existing()
        if unfinished is None and old and not overwrite:
            raise UserError(
                f"{min(old)} exists already ({len(old)} shards of {out}); "
                f"add --overwrite to replace them, or choose another --out"
            )
        source = open_source(path, workers=workers, **options)
        arguments = {
            "source": os.path.abspath(path),
            "files": _state_of(source.files()),
            "samples": len(source),
            **options,
            "nouns": None if found is None else hashlib.sha256("\n".join(found).encode()).hexdigest(),
            "samples_per_shard": samples_per_shard,
            "out": os.path.abspath(out),
        }
        if (images := options.get("images")) is not None:
            arguments["images"] = os.path.abspath(images)
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
    source: Source, target: Target, finder: NounFinder | None, per_shard: int, workers: int, progress: bool
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
    reports = (target.report(number) for number in range(-(-len(source) // per_shard)))
    return [report for report in reports if report is not None]


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


def _check_same(unfinished: dict | None, arguments: dict, target: Target) -> None:
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
