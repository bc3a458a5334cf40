"""The output of ``img2dataset --output_format webdataset`` as a source of samples."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from .pair import Pair, checked, field_of
from .processes import in_processes
from .scan import Bad, read_member, scan
from .sources import Source, Stretches


def finished_tars(root: Path, workers: int = 1) -> Source:
    """The samples with status success of the tars that img2dataset has finished; `workers` processes scan the tars."""
    tars = sorted(root.glob("*.tar"))
    # img2dataset writes a shard's statistics last.
    done = [tar for tar in tars if tar.with_name(f"{tar.stem}_stats.json").is_file()]
    if not done:
        raise UserError(
            f"{root}: {tars[0].name} has no {tars[0].stem}_stats.json; expected img2dataset's output "
            f"(other WebDataset tars can be trained on as they are)"
        )
    places = Stretches(list(in_processes(_whole, done, workers, disable=True)))
    reason = "img2dataset did not finish this tar (it has no _stats.json)"
    unfinished = [Bad(str(tar), "", reason) for tar in sorted(set(tars) - set(done))]
    return Source(places, _read, done, unfinished)


def _read(places: Stretches) -> Iterator[Pair | Bad]:
    for tar, numbers in places.parts:
        with open(tar, "rb") as file:
            for entry in _entries(tar)[numbers.start : numbers.stop]:
                yield entry if isinstance(entry, Bad) else _sample(tar, file.fileno(), entry)


@functools.lru_cache(maxsize=2)  # slices of a tar follow one another
def _entries(tar: Path) -> list[dict | Bad]:
    """The samples of a tar in order, then what it lacks."""
    samples, left_out = scan(tar)
    return [*samples, *(Bad(str(tar), key, reason) for key, reason, _ in left_out)]


def _whole(tar: Path) -> tuple[Path, range]:
    return tar, range(len(_entries(tar)))


def _sample(tar: Path, file: int, entry: dict) -> Pair | Bad:
    key = entry["key"].decode(errors="replace")
    status = field_of(read_member(file, entry, "json"), "status", "success")
    if status != "success":
        return Bad(str(tar), key, f"status {status}")
    return checked(tar, key, read_member(file, entry, "image"), read_member(file, entry, "text"))
