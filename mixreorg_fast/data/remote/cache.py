"""A folder of fetched shards, of limited size, shared by the processes of a node and kept over restarts."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from ...config import CacheConfig
from ...errors import UserError
from ...files import DiskFull, saving
from ..reading.decoder import Decoder
from ..shards.index import NO_CAPTIONS, Counts, Shard, indexed, open_shard
from ..shards.verify import verifying
from .download import Stopped, fetch, partial_path
from .sources import RemoteShard

log = logging.getLogger("mixreorg_fast")
INSTEAD = (
    ": name --cache-size or --cache-folder (and data.cache in the run), or train on them as they are: training fetches "
    "ahead of itself"
)
SPARE = 1 << 30  # bytes of the disk that stay free, for checkpoints


class Cache:
    """Shards on this node's disk.

    A shard is fetched and indexed under a lock of its own, by whichever thread or process asks for it first. When the
    cache is full, shards that are not needed soon are evicted, the least recently used first. Their indexes stay: they
    are small, and tell how many samples a shard holds without fetching it again.

    Args:
        verify: decode every photo, in `threads` threads, before a shard is used (:func:`~..shards.verify.verifying`).
    """

    def __init__(self, settings: CacheConfig, *, verify: bool = True, threads: int = 1) -> None:
        self.folder, self.size = settings.path, settings.capacity
        self.needed: Callable[[], list[Path]] = list  # paths needed soon, soonest first; they are evicted last
        self.kept: frozenset[Path] = frozenset()  # these are never evicted
        self.sizes: dict[Path, int] = {}  # bytes of fetched shards that no source had listed
        self.stop = threading.Event()
        self._patience = settings.patience
        # On the CPU also in training on GPUs: DALI's GPU decoder would disturb the recording of CUDA graphs.
        self._decoder = Decoder(torch.device("cpu"), threads) if verify else None
        self._decoding, self._making_room = threading.Lock(), threading.Lock()
        self._coming: dict[Path, int] = {}  # bytes that are being fetched
        self._indexed = lru_cache(maxsize=64)(self._usable)  # so many indexes stay mapped
        self._failures: dict[Path, tuple[float, UserError]] = {}

    def path(self, shard: RemoteShard) -> Path:
        """Where the shard lies once it is fetched."""
        return self.folder / shard.place

    def size_of(self, shard: RemoteShard) -> int:
        """The shard's bytes: as its source lists them, else as fetched, else the mean of the fetched shards."""
        sizes = list(self.sizes.values())  # other threads add to them
        return shard.size or self.sizes.get(self.path(shard)) or sum(sizes) // max(1, len(sizes))

    @property
    def room(self) -> int:
        """Bytes of shards that may lie here: ``data.cache.size``, or less where the disk is smaller."""
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.folder)
        held = sum(self._tars().values())
        for path in list(self._coming):
            with contextlib.suppress(OSError):
                held += partial_path(path).stat().st_size
        return min(self.size, held + disk.free - min(SPARE, disk.total // 20))

    def known(self, shard: RemoteShard) -> Shard | None:
        """The shard by its index, which outlives eviction; None: it was never fetched."""
        with contextlib.suppress(UserError):
            return self._indexed(self.path(shard))
        return None

    def ready(self, shard: RemoteShard) -> bool:
        """Whether the shard is on the disk, whole and indexed."""
        return self.path(shard).is_file() and self.known(shard) is not None

    def get(self, shard: RemoteShard) -> Shard:
        """The shard on the disk, fetched and indexed if it is not there.

        Raises:
            UserError: its source refuses or is lost, it is damaged there, or the disk is full.
        """
        path, start = self.path(shard), time.monotonic()
        while (got := self.get_unless_coming(shard)) is None:
            if self.stop.wait(0.05):
                raise Stopped
            when, error = self._failures.get(path, (0.0, None))
            if error is not None and when > start:  # of the thread that was waited for: its patience was ours
                raise error
        return got

    def get_unless_coming(self, shard: RemoteShard) -> Shard | None:
        """As :meth:`get`, but None while another thread or process fetches the shard."""
        path = self.path(shard)
        while True:
            if path.is_file() and (found := self.known(shard)) is not None:
                with contextlib.suppress(OSError):
                    if shard.size is None:
                        self.sizes[path] = path.stat().st_size
                    os.utime(f"{path}.index")  # its last use
                return found
            with _locked(path.with_name(f".{path.name}.lock")) as mine:
                if not mine:
                    return None
                self._coming[path] = 0  # not evicted meanwhile
                try:
                    if not path.is_file():
                        self._fetch(shard, path)
                        self._indexed.cache_clear()  # of a file that has changed at a source without versions
                    if not self.ready(shard):
                        self._index(path)
                        if path.is_file() and not self.ready(shard):
                            raise UserError(f"{path}.index: cannot be written")
                except FileNotFoundError:  # another process has evicted it: the loop tries again
                    continue
                except UserError as error:
                    self._failures[path] = time.monotonic(), error
                    raise
                finally:
                    del self._coming[path]

    def _usable(self, path: Path) -> Shard:
        """The shard by its index. Without a usable index it raises a UserError, which is not cached."""
        found = indexed(path)
        if found is None or not (found.verified or self._decoder is None):
            raise UserError(f"{path} is not indexed")
        return found

    def _fetch(self, shard: RemoteShard, path: Path) -> None:
        while True:
            try:
                return fetch(shard, path, self._patience, self.stop, room=partial(self._make_room, path))
            except DiskFull:
                if not self._evict():
                    partial_path(path).unlink(missing_ok=True)
                    raise UserError(
                        f"{self.folder}: the disk is full, and data.cache.size {self.size:,} bytes is not reached; "
                        f"free some, or name a smaller data.cache.size or another data.cache.folder"
                    ) from None

    def _index(self, path: Path) -> None:
        if self._decoder is not None:
            with self._decoding:
                for _ in verifying(path, self._decoder):
                    if self.stop.is_set():
                        raise Stopped
        shard = open_shard(path)
        if shard.problem:
            log.warning("%s: %s; its %d whole samples are used", path, shard.problem, len(shard.samples))

    def _make_room(self, path: Path, size: int) -> None:
        """Evict shards until `size` more bytes fit; a UserError if the cache is too small, or full of kept shards."""
        if size > self.size:
            raise UserError(f"data.cache.size {self.size:,} bytes is less than {path.name} has, {size:,} bytes")
        with self._making_room:
            self._coming[path] = size
            while True:
                on_the_way = dict(self._coming)  # read first: a shard that arrives meanwhile counts among those here
                here = self._tars()
                coming = sum(size for path, size in on_the_way.items() if path not in here)
                if coming + sum(here.values()) <= (room := self.room):
                    return
                if not self._evict():
                    if self.kept:
                        limit = "the cache holds" if room == self.size else "the disk has room for"
                        raise UserError(f"{len(self.kept)} shards have more than {limit}, {room / 1e9:.3g} GB{INSTEAD}")
                    return

    def _tars(self) -> dict[Path, int]:
        """The shards on the disk, with their bytes. A tar without its lock is somebody else's, and never removed."""
        tars = {}
        for folder, _, names in os.walk(self.folder):
            for name in {name[1:].removesuffix(".lock") for name in names if name.endswith(".tar.lock")} & set(names):
                with contextlib.suppress(OSError):
                    tars[Path(folder, name)] = os.stat(os.path.join(folder, name)).st_size
        return tars

    def _evict(self) -> bool:
        """Remove from the disk the shard that is needed least; False: no shard can be removed."""
        used = {path: _used(path) for path in self._tars() if path not in self._coming and path not in self.kept}
        if not used:
            return False
        needed = {path: place for place, path in enumerate(self.needed())}
        least = min(used, key=lambda path: (path in needed, -needed.get(path, 0), used[path]))
        least.unlink(missing_ok=True)
        return True


class CachedShard:
    """A remote shard in the place of a local one: fetched when it is needed."""

    joined = NO_CAPTIONS  # captions are joined to local shards
    evictable = True

    def __init__(self, remote: RemoteShard, cache: Cache) -> None:
        self.remote, self.path, self._cache = remote, cache.path(remote), cache
        self.counts: Counts | None = None  # as of Shard.counts; None: nobody asked yet

    def __len__(self) -> int:
        """The shard's number of samples. The shard is fetched if that is unknown."""
        if self.counts is None:
            self.counts = (self._cache.known(self.remote) or self._cache.get(self.remote)).counts
        return self.counts[0]

    @property
    def known(self) -> bool:
        return self.counts is not None or self._cache.known(self.remote) is not None

    @property
    def samples(self) -> np.ndarray:
        return (self._cache.known(self.remote) or self._cache.get(self.remote)).samples

    def open(self) -> int:
        """A file descriptor of the shard, fetched if it is not there; it stays readable after eviction."""
        while True:
            self._cache.get(self.remote)
            with contextlib.suppress(FileNotFoundError):  # evicted in this moment
                return os.open(self.path, os.O_RDONLY)


def _used(path: Path) -> float:
    """When a shard was last used."""
    with contextlib.suppress(OSError):
        return os.stat(f"{path}.index").st_mtime
    return 0.0


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    """Hold a lock file, unless another thread or process does; its hold ends with its process."""
    with saving(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with open(lock, "ab") as file:
        mine = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        yield mine
