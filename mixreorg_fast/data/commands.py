"""Build training shards from photos and captions, verify them, or draw the embedded scenes."""

from __future__ import annotations

import argparse
import os

from ..config import ScenesConfig
from ..errors import UserError
from .scenes.folder import ensure_scenes
from .shards.build import build
from .shards.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    cores = len(os.sched_getaffinity(0))

    action = actions.add_parser(
        "build",
        help="write shards from photos and captions, Parquet files or img2dataset's output",
        description="Write shards. The same command continues an interrupted build.",
    )
    action.add_argument(
        "source",
        help="a folder of photos with NAME.txt beside NAME.jpg; a CSV of photos and captions, or a folder with "
        "captions.csv or captions.tsv; a .parquet file or a folder of some; or img2dataset's output (webdataset)",
    )
    action.add_argument("--out", required=True, metavar="PATTERN", help="such as 'data/mine/train-{000000..}.tar'")
    action.add_argument("--split", metavar="NAME", help="only the photos that splits/NAME.txt lists, or NAME-*.parquet")
    action.add_argument("--images", metavar="FOLDER", help="photos that a CSV names; default: its folder, or images/")
    action.add_argument("--image-column", metavar="NAME", help="default: image, filepath, …; Parquet's: image, jpg, …")
    action.add_argument("--caption-column", metavar="NAME", help="default: caption, text, title, …")
    action.add_argument("--nouns", metavar="FILE", help="words and phrases, one per line, to find in the captions")
    action.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default: %(default)s")
    action.add_argument("--overwrite", action="store_true", help="replace the shards of PATTERN")
    action.add_argument("--workers", type=int, default=cores, metavar="N", help="processes; default: all cores")

    action = actions.add_parser(
        "verify",
        help="decode every photo; index the samples that can be used, list the others",
        description="Decode every photo with training's decoder. Training leaves out what is found broken. "
        "Exit code 0: all sound; 1: something is broken; 2: nothing could be read.",
    )
    action.add_argument("pattern", nargs="+", help="shards: brace or glob patterns")
    action.add_argument("--workers", type=int, default=cores, metavar="N", help="processes; default: all cores")
    action.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPUs, or the CPU of a machine without")

    defaults = ScenesConfig()
    action = actions.add_parser(
        "scenes",
        help="draw the embedded scenes, as training does by itself",
        description="Draw the scenes that a run without configured shards trains on.",
    )
    action.add_argument("--out", default=defaults.folder, metavar="FOLDER", help="default: %(default)s")
    for name in ("train", "val", "size", "seed"):
        action.add_argument(
            f"--{name}", type=int, default=getattr(defaults, name), metavar="N", help="default: %(default)s"
        )


def main(args: argparse.Namespace) -> int:
    """0: success; 1: `verify` found broken samples (and left them out of the index); 2: no sample can be used."""
    for name in ("samples_per_shard", "workers", "train", "val", "size"):
        if (value := getattr(args, name, 1)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    return {"build": _build, "verify": _verify, "scenes": _scenes}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    options = (
        "split",
        "images",
        "image_column",
        "caption_column",
        "nouns",
        "samples_per_shard",
        "overwrite",
        "workers",
    )
    built = build(args.source, args.out, **{name: getattr(args, name) for name in options})
    paths = built.shards
    names = f"{paths[0]}" + (f" … {paths[-1].name}, {len(paths)} shards" if len(paths) > 1 else "")
    print(f"wrote {built.samples} samples to {names}")
    for reason, count in built.reasons:
        print(f"skipped {count}: {reason}")
    if built.skipped:
        print(f"what was skipped, with reasons: {built.skipped_list}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    good = bad = 0
    for shard in verify(args.pattern, workers=args.workers, device=args.device):
        good, bad = good + len(shard.samples), bad + shard.broken
        for entry in shard.bad:
            print(f"{entry}".replace("\t\t", ": ").replace("\t", ": "))
    print(f"{good} samples are sound" + (f", {bad} broken (left out of the index)" if bad else ""))
    return 2 if not good else 1 if bad else 0


def _scenes(args: argparse.Namespace) -> int:
    made = ensure_scenes(ScenesConfig(folder=args.out, train=args.train, val=args.val, size=args.size, seed=args.seed))
    folders = f"{made.evaluation}, {made.unseen}, {made.small}"
    print(f"{len(made.train)} training and {len(made.val)} validation shards, {folders}")
    return 0
