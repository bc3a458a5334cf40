"""The shards as all ranks see them: made ready before training reads them, and what of them is of no use."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import devices
from ..config import Config
from ..data.reading.decoder import Decoder
from ..data.reading.loader import TrainLoader, reading_threads, shard_sets, training_shards
from ..data.shards.shards import Bad, ShardSet, expand, open_shard, open_shards
from ..data.shards.verify import is_ready, too_many_bad, verifying
from ..errors import UserError
from ..files import atomic_path
from .distributed import World, mean_over_ranks, on_main

# Seconds between exchanges while the ranks work on shards, and between steps of the bar.
SLICE = 5.0
NETWORK_DISK = 65.0


def ready_shards(config: Config, world: World) -> None:
    """Index every shard of the run that is not yet, having decoded its photos (unless ``data.verify`` is off).

    The ranks share the work; call on every rank. It may take hours, but no exchange waits for longer than a slice of
    it. What was done when it is interrupted need not be done again. The embedded scenes were encoded here and are
    left as they are.

    Raises:
        UserError: no shards; the ranks see different ones.
    """
    if config.data.shards is None:
        return
    patterns = [pattern for pattern, _ in shard_sets(config.data)]
    paths = on_main(world, lambda: list(dict.fromkeys(path for pattern in patterns for path in expand(pattern))))
    local = devices.local_rank(), devices.local_size()
    # First all ranks together. What a node does not see then lies on disks of its own: its ranks do that.
    for rank, size in ((world.rank, world.size), local):
        mine = _unready(paths, config)[rank::size]
        work = _verify(mine, config, world) if config.data.verify else _index(mine)
        if not _work_together(work, mine, world):
            break
        if world.size > local[1]:
            _wait_for_files(paths, config)
    _compare(training_shards(config, warn=False), world)


def check_bad(shards: ShardSet, config: Config) -> None:
    """
    Raises:
        UserError: the indexes leave out more than ``data.max_bad`` of the samples.
    """
    if too_many_bad(shards.lost, len(shards), config.data.max_bad):
        raise UserError(
            f"{_too_many(shards.lost, len(shards) + shards.lost, config)}; SHARD.broken.tsv beside each shard lists "
            f"them, such as {': '.join(filter(None, shards.bad[0]))}"
        )


def order_digest(config: Config) -> str:
    """What the order of samples depends on besides the seed: when it changes, positions mean other samples."""
    digest = hashlib.sha256()
    for pattern, weight in shard_sets(config.data):
        digest.update(f"{weight} {open_shards(pattern, warn=False).sizes.tolist()}\n".encode())
    return digest.hexdigest()


class BadSamples:
    """Account of the samples of no use over all ranks, in ``bad_samples.tsv`` of the run folder: shard, key, reason.

    Args:
        samples: consumed by the run so far.
    """

    def __init__(self, config: Config, world: World, samples: int) -> None:
        self._config, self._world = config, world
        self._path = config.run_folder / "bad_samples.tsv"
        self._found: dict[tuple[str, str], Bad] = {}
        self._sent = 0
        self._before = -1.0
        self._consumed = samples
        self._count = self._total = 0

    def count(self, loader: TrainLoader) -> int:
        """How many there are, those that the shards' indexes leave out included. Call on every rank.

        Raises:
            UserError: they are more than ``data.max_bad`` of all.
        """
        own = loader.bad_samples
        (mean,) = mean_over_ranks(torch.tensor([float(len(own))], device=self._world.device), self._world)
        if mean == self._before:
            return self._count
        self._before = mean
        parts: list[list[Bad]] = [own[self._sent :]]
        if self._world.size > 1:
            parts = [[] for _ in range(self._world.size)]
            dist.all_gather_object(parts, own[self._sent :])
        self._sent = len(own)
        self._found.update({(bad.shard, bad.key): bad for part in parts for bad in part})
        self._count, self._total = loader.lost + len(self._found), loader.samples + loader.lost
        if self._world.is_main and self._count:
            self._list(loader)
        # `samples` of the indexes include those found now.
        if too_many_bad(self._count, self._total - self._count, self._config.data.max_bad):
            raise UserError(f"{_too_many(self._count, self._total, self._config)}; {self._path} lists them")
        return self._count

    def remark(self, samples: int, loader: TrainLoader) -> str | None:
        """What to say of the epoch that has ended since the last time; `samples`: consumed by the run so far."""
        epoch, before = samples // loader.samples, self._consumed // loader.samples
        self._consumed = samples
        if epoch == before:
            return None
        found = f"{self._count} of {self._total} samples were of no use" if self._count else "every sample was of use"
        return f"epoch {epoch} ended: {found}" + (f" ({self._path})" if self._count else "")

    def _list(self, loader: TrainLoader) -> None:
        lines = {str(bad): None for bad in (*loader.left_out, *self._found.values())}
        if self._path.is_file():  # of the run before it was resumed
            lines = dict.fromkeys(self._path.read_text(encoding="utf-8").splitlines()) | lines
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _too_many(bad: int, total: int, config: Config) -> str:
    return f"{bad} of {total} samples of data.shards cannot be used, more than data.max_bad {config.data.max_bad:g}"


def _unready(paths: Sequence[Path], config: Config) -> list[Path]:
    return [path for path in paths if path.is_file() and not is_ready(path, verified=config.data.verify)]


def _wait_for_files(paths: Sequence[Path], config: Config) -> None:
    """Give what other nodes wrote to a network disk time to appear: its clients look again after a minute at most."""
    until = time.monotonic() + NETWORK_DISK
    while _unready(paths, config) and time.monotonic() < until:
        time.sleep(1)


def _verify(paths: Sequence[Path], config: Config, world: World) -> Iterator[int]:
    """Verify shards one after the other; yields bytes read, often."""
    decoder = Decoder(world.device, reading_threads(config.data)) if paths else None
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # it has vanished meanwhile: its index, if any, keeps its place
            yield from verifying(path, decoder)


def _index(paths: Sequence[Path]) -> Iterator[int]:
    for path in paths:
        open_shard(path)
        yield path.stat().st_size


def _work_together(work: Iterator[int], paths: Sequence[Path], world: World) -> bool:
    """Go through this rank's `work` until every rank is through with its own, and show how far all are.

    Returns:
        whether any rank had something to do.

    Raises:
        UserError: of any rank, on all of them.
    """
    (total,) = _sum([sum(path.stat().st_size for path in paths)], world)
    if not total:
        return False
    error, finished = None, False
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not world.is_main) as bar:
        while True:
            read, until = 0, time.monotonic() + SLICE
            while not finished and time.monotonic() < until:
                try:
                    step = next(work, None)
                except (UserError, OSError) as failure:
                    error, step = str(failure), None
                finished = step is None
                read += step or 0
            read, through, failed = _sum([read, int(finished), int(error is not None)], world)
            bar.update(read)
            if through == world.size:
                break
    if failed:
        raise UserError(next(filter(None, _gathered(error, world))))
    return True


def _compare(shards: ShardSet, world: World) -> None:
    """See that all ranks have the same samples in the same order, without which they would drift apart unnoticed."""
    digest = hashlib.sha256()
    for shard in shards.shards:
        digest.update(f"{shard.path.name} {len(shard.samples)} {shard.broken}\n".encode())
    answers = _gathered((digest.hexdigest(), len(shards), socket.gethostname()), world)
    first, samples, host = answers[0]
    for rank, (other, count, name) in enumerate(answers):
        if other != first:
            raise UserError(
                f"rank {rank} on {name} sees other shards than rank 0 on {host} ({count} and {samples} samples); "
                f"copy the shards and their .index files to all nodes alike"
            )


def _sum(values: list[int], world: World) -> list[int]:
    tensor = torch.tensor(values, dtype=torch.int64, device=world.device)
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def _gathered(value, world: World) -> list:
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values
