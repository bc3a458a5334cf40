"""Fetch public sets of shards ahead of a run, and verify them."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from ...config import CacheConfig, DataConfig, describe
from ...errors import UserError, nearest
from ..reading.training_set import open_cache
from ..shards.index import Shard
from .cache import INSTEAD
from .sets import fetched, remote_shards


class KnownSet(NamedTuple):
    """A public set of image-text pairs in shards, as its page describes it."""

    pattern: str
    samples: int
    shards: int
    licence: str


# From the sets' pages on the hub. Bytes are not listed here: `get` asks the hub for them.
KNOWN = {
    "cc3m": KnownSet("hf://datasets/pixparse/cc3m-wds/cc3m-train-*.tar", 2_905_954, 576, "conceptual-captions"),
    "cc3m-val": KnownSet("hf://datasets/pixparse/cc3m-wds/cc3m-validation-*.tar", 13_443, 16, "conceptual-captions"),
    "cc12m": KnownSet("hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar", 10_968_539, 2176, "conceptual-12m"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the public sets that `get` knows by name")
    action = actions.add_parser(
        "get",
        help="fetch and verify a set, for runs without a network or with a slow one",
        description="Fetch all shards of a set into the cache and verify them. Exit code 0: all sound; 1: some samples "
        "are broken; 2: no sample could be read. The same command continues an interrupted one. Training on the set "
        "needs no `get`: it fetches ahead of itself.",
    )
    action.add_argument("set", nargs="+", help="a name that `list` lists, or hf://, s3:// or https:// patterns")
    add_cache_arguments(action)


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name a cache; a run finds it by the same settings."""
    parser.add_argument("--cache-folder", metavar="FOLDER", help="of remote shards; default: ~/.cache/mixreorg/remote")
    parser.add_argument("--cache-size", metavar="SIZE", default=CacheConfig().size, help="default: %(default)s")


def main(args: argparse.Namespace) -> int:
    if args.action == "list":
        print(f"{'name':10}{'samples':>12}{'shards':>8}  {'licence':22}pattern")
        for name, known in KNOWN.items():
            print(f"{name:10}{known.samples:12,}{known.shards:8,}  {known.licence:22}{known.pattern}")
        return 0
    patterns = [KNOWN[name].pattern if name in KNOWN else name for name in args.set]
    unknown = next((name for name in patterns if "/" not in name), None)
    if unknown is not None:
        raise UserError(f"no set {unknown}{nearest(unknown, KNOWN)}; others by a pattern such as hf://datasets/…/*.tar")
    return print_report(get(patterns, cache_of(args), keep=True))


def cache_of(args: argparse.Namespace) -> CacheConfig:
    try:
        return CacheConfig.model_validate({"folder": args.cache_folder, "size": args.cache_size})
    except ValidationError as error:
        raise UserError(f"--cache-{describe(error, CacheConfig)}") from None


def get(patterns: Sequence[str], settings: CacheConfig, *, keep: bool = False, workers: int = 1) -> Iterable[Shard]:
    """Fetch and verify remote shards; yields them in order.

    Args:
        keep: all of them stay in the cache: they must fit into it together.
        workers: threads that decode.

    Raises:
        UserError: as :func:`~.sets.remote_shards`; they do not fit; a shard cannot be fetched.
    """
    shards = remote_shards(patterns, settings)
    if shards is None:
        raise UserError(f"{', '.join(patterns)}: local shards; `mixreorg shards verify` verifies them")
    cache = open_cache(DataConfig(cache=settings, threads=workers))
    if keep:
        total = sum(shard.size or 0 for shard in shards)
        missing = sum(shard.size or 0 for shard in shards if not cache.path(shard).is_file())
        if total > cache.size:
            raise UserError(f"{len(shards)} shards have {total / 1e9:.3g} GB, more than the cache holds{INSTEAD}")
        cache.folder.mkdir(parents=True, exist_ok=True)
        if missing > (free := shutil.disk_usage(cache.folder).free):
            raise UserError(f"{cache.folder}: {missing / 1e9:.3g} GB are to be fetched, {free / 1e9:.3g} GB are free")
        cache.kept = frozenset(cache.path(shard) for shard in shards)
    return fetched(cache, shards, settings.workers)


def print_report(shards: Iterable[Shard]) -> int:
    """Print what is broken of shards, and how many samples are sound; returns the exit code."""
    good = bad = 0
    for shard in shards:
        good, bad = good + len(shard.samples), bad + shard.broken
        for entry in shard.bad:
            print(f"{entry}".replace("\t\t", ": ").replace("\t", ": "))
    print(f"{good} samples are sound" + (f", {bad} broken (left out of the index)" if bad else ""))
    return 2 if not good else 1 if bad else 0
