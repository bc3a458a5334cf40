"""Verifying shards: every photo is decoded by the decoder that training uses, before training reads it.

One photo that cannot be decoded would lose its whole batch. So the index of a verified shard leaves out the samples
that cannot be used, and a list beside it gives their reasons.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from ... import devices
from ..reading.decoder import BATCH, Decoder
from .index import Shard, indexed, open_shard, write_index
from .pair import captions_of
from .patterns import expand
from .processes import advance, in_processes
from .scan import LeftOut, read_member, scan


def verify(
    patterns: str | Sequence[str], *, workers: int = 1, progress: bool = True, device: str | None = None
) -> Iterator[Shard]:
    """Verify shards whether they were verified before or not, in `workers` processes (four a GPU at most).

    Yields the shards in order, as they are indexed now. `device`, "cpu" or "cuda", tells whose decoder to use; None: as
    training chooses.
    """
    kind = devices.choose(device).type
    paths = [path for path in expand(patterns) if path.is_file()]
    if kind == "cuda":  # each process has a context of its own there
        workers = min(workers, 4 * torch.cuda.device_count())
    total = sum(path.stat().st_size for path in paths)
    bar = {"total": total, "unit": "B", "unit_scale": True, "desc": "verify", "disable": not progress}
    yield from in_processes(partial(verify_shard, kind=kind), paths, workers, **bar)


def verify_shard(path: Path, kind: str = "cpu") -> Shard:
    """Verify one shard with this process's decoder on a `kind` of device; returns it as it is indexed now."""
    for read in verifying(path, _own_decoder(kind)):
        advance(read)
    return open_shard(path)


def verifying(path: Path, decoder: Decoder) -> Iterator[int]:
    """Verify one shard a batch at a time, for callers with other work in between; yields the bytes of the tar that have
    been read since the last time."""
    status = os.stat(path)
    samples, left_out = scan(path)
    sound: list[dict] = []
    done = 0
    with open(path, "rb") as file:
        for first in range(0, len(samples), BATCH):
            batch = samples[first : first + BATCH]
            problems = _problems(file.fileno(), batch, decoder)
            sound += [sample for place, sample in enumerate(batch) if place not in problems]
            for place, reason in sorted(problems.items()):
                left_out.append(LeftOut(batch[place]["key"].decode(errors="replace"), reason))
            at = batch[-1]["start"] + batch[-1]["span"]
            yield max(0, at - done)
            done = max(done, at)
    write_index(path, status, sound, left_out, verified=True)
    yield max(0, status.st_size - done)


def is_ready(path: Path, *, verified: bool) -> bool:
    """Whether a shard has an index of its present state that is `verified`, if that is asked for."""
    shard = indexed(path)
    return shard is not None and (shard.verified or shard.gone or not verified)


def _problems(file: int, samples: list[dict], decoder: Decoder) -> dict[int, str]:
    """Places and reasons of the samples that cannot be used."""
    reasons: dict[int, str] = {}
    photos: dict[int, np.ndarray] = {}
    for place, sample in enumerate(samples):
        try:
            captions_of(read_member(file, sample, "text"))
            photo = read_member(file, sample, "image")
            decoder.size(photo)
            photos[place] = np.frombuffer(photo, np.uint8)
        except ValueError as error:
            reasons[place] = str(error)
    places = list(photos)
    return reasons | {places[n]: reason for n, reason in decoder.failing(list(photos.values())).items()}


@cache
def _own_decoder(kind: str) -> Decoder:
    """This process's decoder on a kind of device: building one takes longer than a small shard."""
    place = f"{kind}:{os.getpid() % torch.cuda.device_count()}" if kind == "cuda" else kind
    return Decoder(torch.device(place), 1)
