"""The training set on all ranks: indexed and verified together before training, and an account of its bad samples."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm import tqdm

from ..config import Config
from ..data.reading.decoder import Decoder
from ..data.reading.samples import reading_threads
from ..data.reading.training_set import TrainingSet, shard_sets
from ..data.remote.sets import listed, remote_shards
from ..data.shards.index import open_shard
from ..data.shards.patterns import expand
from ..data.shards.scan import Bad
from ..data.shards.verify import is_ready, verifying
from ..errors import UserError
from ..files import write_text
from ..ranks import Ranks, gather_objects, local_rank, local_size, on_main, sum_over_ranks

# Seconds between exchanges while the ranks work on shards, and between steps of the bar.
SLICE = 5.0
NETWORK_DISK = 65.0


def open_training_set(config: Config, ranks: Ranks, state: Mapping = MappingProxyType({})) -> TrainingSet:
    """Index every shard of the run that has no index, having decoded its photos (unless ``data.verify`` is off), and
    open the training set. The embedded scenes are not decoded: this program wrote them.

    The ranks share the work; call on every rank. The work may take hours, but no exchange between ranks waits longer
    than a slice of it. After an interruption, finished shards are not indexed again. Of remote shards the first window
    is fetched; the others follow as the run comes to them.

    Args:
        config: with ``data.shards`` set (:func:`~mixreorg_fast.data.scenes.folder.with_scenes`).
        state: of the checkpoint from which the run resumes.
    Raises:
        UserError: no shards; the ranks see different shards.
    """
    if not config.data.is_scenes:
        patterns = [pattern for pattern, _ in shard_sets(config.data)]
        _list_alike(patterns, config)
        patterns = [pattern for pattern in patterns if remote_shards(pattern, config.data.cache) is None]
        paths = on_main(lambda: list(dict.fromkeys(path for pattern in patterns for path in expand(pattern))))
        local = local_rank(), local_size()
        # First all ranks share the shards. Those that a node does not see are on another node's disk; the ranks of that
        # node index them in the second round.
        for rank, size in ((ranks.rank, ranks.size), local):
            mine = _unready(paths, config)[rank::size]
            if not _work_together(_index(mine, config, ranks), mine, ranks):
                break
            if ranks.size > local[1]:
                _wait_for_files(paths, config)
    return _open_alike(config, ranks, state)


def _list_alike(patterns: Sequence, config: Config) -> None:
    """Let rank 0 list remote shards, and all ranks take its list."""

    def lists() -> dict:
        for pattern in (*patterns, config.data.val_shards or ()):
            remote_shards(pattern, config.data.cache)
        return listed

    listed.update(on_main(lists))


def check_bad(training_set: TrainingSet, config: Config) -> None:
    """Raise a UserError if the indexes leave out more than ``data.max_bad`` of the samples."""
    lost, total = training_set.lost, training_set.lost + training_set.indexed
    # Of remote shards that a checkpoint counted, this machine may have no list.
    example = ": ".join(filter(None, next(iter(training_set.bad), ()))) if lost else ""
    _refuse_many(lost, total, config, f"SHARD.broken.tsv lists them where it can be written: {example}")


class BadSamples:
    """Account of the bad samples over all ranks, in ``bad_samples.tsv`` of the run folder: shard, key, reason.

    `samples` is the number consumed by the run so far.
    """

    def __init__(self, config: Config, ranks: Ranks, training_set: TrainingSet, samples: int) -> None:
        self._config, self._ranks, self._training_set = config, ranks, training_set
        self._path = config.run_folder / "bad_samples.tsv"
        self._found: dict[tuple[str, str], Bad] = {}
        self._sent, self._before, self._count = 0, [-1, -1], 0
        self._consumed = samples

    @property
    def _total(self) -> int:
        return self._training_set.indexed + self._training_set.lost

    def count(self, own: list[Bad]) -> int:
        """The number of bad samples over all ranks, with those that the shards' indexes leave out. Call on every rank.

        `own`: the bad samples that this rank has found so far. A share above ``data.max_bad`` raises a UserError.
        """
        lost, total = (self._training_set.lost, self._total) if self._ranks.is_main else (0, 0)
        *found, total = sum_over_ranks(torch.tensor([len(own), lost, total], device=self._ranks.device)).tolist()
        if found == self._before:
            return self._count
        self._before = found
        parts = gather_objects(own[self._sent :])
        self._sent = len(own)
        self._found.update({(bad.shard, bad.key): bad for part in parts for bad in part})
        self._count = found[1] + len(self._found)
        if self._ranks.is_main and self._count:
            lines = {str(bad): None for bad in (*self._training_set.bad, *self._found.values())}
            if self._path.is_file():  # of the run before it was resumed
                lines = dict.fromkeys(self._path.read_text(encoding="utf-8").splitlines()) | lines
            write_text(self._path, "".join(f"{line}\n" for line in lines))
        _refuse_many(self._count, total, self._config, f"{self._path} lists them")
        return self._count

    def remark(self, samples: int) -> str | None:
        """A line about the epoch that ended since the last call, if any; `samples`: consumed by the run so far."""
        epoch, before = (consumed // len(self._training_set) for consumed in (samples, self._consumed))
        self._consumed = samples
        if epoch == before:
            return None
        if not self._count:
            return f"epoch {epoch} ended: no bad samples"
        return f"epoch {epoch} ended: {self._count} of {self._total} samples could not be used ({self._path})"


def _refuse_many(bad: int, total: int, config: Config, where: str) -> None:
    limit = config.data.max_bad
    if bad > limit * total:
        raise UserError(
            f"{bad} of {total} samples of data.shards cannot be used, more than data.max_bad {limit:g}; {where}"
        )


def _unready(paths: Sequence[Path], config: Config) -> list[Path]:
    return [path for path in paths if path.is_file() and not is_ready(path, verified=config.data.verify)]


def _wait_for_files(paths: Sequence[Path], config: Config) -> None:
    """Wait for files that other nodes wrote to a network disk: its clients may look only once a minute."""
    until = time.monotonic() + NETWORK_DISK
    while _unready(paths, config) and time.monotonic() < until:
        time.sleep(1)


def _index(paths: Sequence[Path], config: Config, ranks: Ranks) -> Iterator[int]:
    """Index shards one after the other, and decode their photos unless ``data.verify`` is off; yields bytes read,
    often."""
    decoder = Decoder(ranks.device, reading_threads(config.data)) if paths and config.data.verify else None
    for path in paths:
        if decoder is None:
            open_shard(path)
            yield path.stat().st_size
            continue
        with contextlib.suppress(FileNotFoundError):  # the file has been deleted since; its index, if any, stays
            yield from verifying(path, decoder)


def _work_together(work: Iterator[int], paths: Sequence[Path], ranks: Ranks) -> bool:
    """Go through this rank's `work` until every rank has finished its own, and show the progress of all.

    Returns whether any rank had something to do. A UserError of any rank is raised on all of them.
    """
    total = sum_over_ranks(torch.tensor(sum(path.stat().st_size for path in paths), device=ranks.device)).item()
    if not total:
        return False
    error, finished, through = None, False, 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not ranks.is_main) as bar:
        while through < ranks.size:
            read, until = 0, time.monotonic() + SLICE
            while not finished and time.monotonic() < until:
                try:
                    step = next(work, None)
                except (UserError, OSError) as failure:
                    error, step = str(failure), None
                finished = step is None
                read += step or 0
            read, through = sum_over_ranks(torch.tensor([read, int(finished)], device=ranks.device)).tolist()
            bar.update(read)
    if errors := [each for each in gather_objects(error) if each]:
        raise UserError(errors[0])
    return True


def _open_alike(config: Config, ranks: Ranks, state: Mapping) -> TrainingSet:
    """Open the training set on every rank.

    A rank that cannot, or that has other samples or another order than rank 0, ends all of them in a UserError.
    """
    training_set, error, digest = None, None, ""
    try:
        training_set = TrainingSet.open(config, warn=ranks.is_main)
        digest = hashlib.sha256("".join(part.fingerprint for part in training_set.sets).encode()).hexdigest()
        known = state.get("remote", ()) if state.get("order") == training_set.digest else ()
        training_set.begin(known, progress=local_rank() == 0)
    except UserError as failure:
        error = str(failure)
    answers = gather_objects((error, digest, len(training_set or ()), socket.gethostname()))
    _, first, samples, host = answers[0]
    for rank, (problem, other, count, name) in enumerate(answers):
        if problem is not None:
            raise UserError(f"rank {rank} on {name}: {problem}" if rank else problem)
        if other != first:
            raise UserError(
                f"rank {rank} on {name} sees other shards than rank 0 on {host} ({count} and {samples} samples); "
                f"copy the shards and their .index and .captions files to all nodes alike"
            )
    assert training_set is not None, "a rank that cannot open the set has raised above"
    return training_set
