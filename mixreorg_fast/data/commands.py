"""Build training shards from photos and captions, verify them, or draw the embedded scenes."""

from __future__ import annotations

import argparse
import os

from ..config import ScenesConfig
from ..errors import UserError
from .build import build, verify
from .scenes import ensure_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    action = actions.add_parser("build", help="shards from a folder with captions.tsv and images/")
    action.add_argument("folder", help="holds captions.tsv (photo TAB caption), images/ and perhaps splits/")
    action.add_argument("--out", required=True, metavar="PATTERN", help="such as 'data/mine/train-{000000..}.tar'")
    action.add_argument("--split", metavar="NAME", help="only the photos that splits/NAME.txt lists")
    action.add_argument("--nouns", metavar="FILE", help="words and phrases, one per line, to find in the captions")
    action.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default: %(default)s")
    action.add_argument("--overwrite", action="store_true", help="replace the shards of PATTERN")

    action = actions.add_parser("verify", help="decode every photo; index the sound samples, list the broken ones")
    action.add_argument("pattern", nargs="+", help="shards: brace or glob patterns")
    action.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes; default: all cores"
    )

    defaults = ScenesConfig()
    action = actions.add_parser("scenes", help="draw the embedded scenes, as training does by itself")
    action.add_argument("--out", default=defaults.folder, metavar="FOLDER", help="default: %(default)s")
    for name in ("train", "val", "size", "seed"):
        action.add_argument(
            f"--{name}", type=int, default=getattr(defaults, name), metavar="N", help="default: %(default)s"
        )


def main(args: argparse.Namespace) -> int:
    """0: all is well; 1: `verify` found broken samples (and left them out of the index); 2: a user error."""
    return {"build": _build, "verify": _verify, "scenes": _scenes}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {args.samples_per_shard}: expected at least 1")
    paths = build(
        args.folder,
        args.out,
        split=args.split,
        nouns=args.nouns,
        samples_per_shard=args.samples_per_shard,
        overwrite=args.overwrite,
    )
    print(f"wrote {paths[0]}" + (f" … {paths[-1].name}, {len(paths)} shards" if len(paths) > 1 else ""))
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected at least 1")
    good = bad = 0
    for path, sound, broken in verify(args.pattern, workers=args.workers):
        good, bad = good + sound, bad + len(broken)
        for key, reason in broken.items():
            print(f"{path}: {key + ': ' if key else ''}{reason}")
    print(f"{good} samples are sound" + (f", {bad} broken (left out of the index)" if bad else ""))
    return 1 if bad else 0


def _scenes(args: argparse.Namespace) -> int:
    for name in ("train", "val", "size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    config = ScenesConfig(folder=args.out, train=args.train, val=args.val, size=args.size, seed=args.seed)
    made = ensure_scenes(config)
    print(f"{len(made.train)} training and {len(made.val)} validation shards, {made.evaluation}, {made.unseen}")
    return 0
