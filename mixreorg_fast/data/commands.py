"""Build training shards from photos and captions, verify them, join captions to them, or draw the embedded scenes."""

from __future__ import annotations

import argparse
import os
from collections import Counter

from ..config import ScenesConfig
from ..errors import UserError
from .remote.command import add_cache_arguments, cache_of, get, print_report
from .remote.sets import remote_shards
from .remote.sources import is_remote
from .scenes.folder import ensure_scenes
from .shards.build import build
from .shards.join import join
from .shards.patterns import without_secrets
from .shards.verify import verify

# Options of `build` that take a text.
TEXTS = {
    "split": ("NAME", "only the photos that splits/NAME.txt lists, or NAME-*.parquet"),
    "images": ("FOLDER", "photos that a CSV names; default: its folder, or images/"),
    "image_column": ("NAME", "default: image, filepath, …; Parquet's: image, jpg, …"),
    "caption_column": ("NAME", "default: caption, text, title, …"),
    "nouns": ("FILE", "words and phrases, one per line, to find in the captions"),
}
SCENES = ("train", "val", "size", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    number = {"type": int, "metavar": "N", "help": "default: %(default)s"}
    workers = number | {"default": len(os.sched_getaffinity(0)), "help": "processes; default: all cores"}

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
    for name, (value, about) in TEXTS.items():
        action.add_argument(_flag(name), metavar=value, help=about)
    action.add_argument("--samples-per-shard", default=10_000, **number)
    action.add_argument("--overwrite", action="store_true", help="replace the shards of PATTERN")
    action.add_argument("--workers", **workers)

    action = actions.add_parser(
        "verify",
        help="decode every photo; index the samples that can be used, list the others",
        description="Decode every photo with training's decoder. Training leaves out what is found broken. "
        "Exit code 0: all sound; 1: something is broken; 2: nothing could be read.",
    )
    action.add_argument("pattern", nargs="+", help="shards: brace or glob patterns; hf://, s3:// or https:// too")
    action.add_argument("--workers", **workers)
    add_cache_arguments(action)
    action.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPUs, or the CPU of a machine without")

    action = actions.add_parser(
        "join",
        help="add further captions to shards, from tables with the keys of samples",
        description="Store the captions of tables beside the shards. Training draws from all captions of a sample.",
    )
    action.add_argument("shards", metavar="SHARDS", help="brace or glob patterns")
    action.add_argument("tables", nargs="+", metavar="TABLE", help="Parquet, JSONL, CSV, TSV; or folders with some")
    action.add_argument("--key", required=True, metavar="COLUMN", help="the samples' keys, or the names of photos")
    action.add_argument(
        "--text", nargs="+", default=[], metavar="COLUMN", help="captions; default: caption, text, title, …"
    )

    defaults = ScenesConfig()
    action = actions.add_parser(
        "scenes",
        help="draw the embedded scenes, as training does by itself",
        description="Draw the scenes that a run without configured shards trains on.",
    )
    action.add_argument("--out", default=defaults.folder, metavar="FOLDER", help="default: %(default)s")
    for name in SCENES:
        action.add_argument(f"--{name}", default=getattr(defaults, name), **number)


def main(args: argparse.Namespace) -> int:
    """0: success; 1: `verify` found broken samples (and left them out of the index); 2: no sample can be used."""
    for name in ("samples_per_shard", "workers", "train", "val", "size"):
        if (value := getattr(args, name, 1)) < 1:
            raise UserError(f"{_flag(name)} {value}: expected at least 1")
    return {"build": _build, "verify": _verify, "join": _join, "scenes": _scenes}[args.action](args)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _build(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in (*TEXTS, "samples_per_shard", "overwrite", "workers")}
    built = build(args.source, args.out, **options)
    paths = built.shards
    names = f"{paths[0]}" + (f" … {paths[-1].name}, {len(paths)} shards" if len(paths) > 1 else "")
    print(f"wrote {built.samples} samples to {names}")
    for reason, count in Counter(bad.reason for bad in built.skipped).most_common():
        print(f"skipped {count}: {reason}")
    if built.skipped:
        print(f"what was skipped, with reasons: {built.skipped_list}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    settings = cache_of(args)
    if remote_shards(args.pattern, settings):
        return print_report(get(args.pattern, settings, workers=args.workers))
    return print_report(verify(args.pattern, workers=args.workers, device=args.device))


def _join(args: argparse.Namespace) -> int:
    if is_remote(args.shards):
        raise UserError(f"{without_secrets(args.shards)}: captions are joined to local shards; copy these first")
    print("\n".join(join(args.shards, args.tables, key=args.key, texts=args.text)))
    return 0


def _scenes(args: argparse.Namespace) -> int:
    made = ensure_scenes(ScenesConfig(folder=args.out, **{name: getattr(args, name) for name in SCENES}))
    folders = f"{made.evaluation}, {made.unseen}, {made.small}"
    print(f"{len(made.train)} training and {len(made.val)} validation shards, {folders}")
    return 0
