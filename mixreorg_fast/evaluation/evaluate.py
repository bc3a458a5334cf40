"""Score weights zero-shot on a segmentation data set: mIoU, a table per class, pictures."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .. import devices, ranks
from ..errors import UserError
from ..files import saving, write_json
from ..inference.options import WEIGHTS_HELP, add_options, load_on_device, options_of
from .datasets import KINDS, open_dataset
from .metrics import FREQUENT
from .pictures import dataset_figure
from .zero_shot import evaluate, segmenter_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, metavar="DIR", help=WEIGHTS_HELP)
    parser.add_argument("--dataset", default="plain", metavar="KIND", help=f"folder layout: {', '.join(KINDS)}")
    parser.add_argument("--root", required=True, metavar="FOLDER", help="the data set's folder")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--out", metavar="FILE", help="where the scores go as JSON")
    parser.add_argument("--pictures", metavar="FILE", help="PNG of some photos, truths, predictions and segments")
    parser.add_argument("--predictions", metavar="FOLDER", help="the labels of every photo, as palette PNGs")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")
    parser.add_argument("--limit", type=int, metavar="N", help="score only N photos, spread over the split")
    add_options(parser, decoding="groupvit")


@contextlib.contextmanager
def joined_ranks(device: str | None) -> Iterator[str | None]:
    """Join the ranks that torchrun or deepspeed started, if any; gives the device of this one.

    Raises:
        UserError: as :func:`mixreorg_fast.devices.choose`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    chosen = devices.choose(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    ranks.wait_patiently()
    yield str(chosen)
    # Not after an error: the others wait for this rank, until the launcher ends them.
    dist.destroy_process_group()


def class_table(per_class: dict[str, float | None]) -> str:
    """Lines of name and IoU in percent; a dash for a class that never occurs."""
    width = max(map(len, per_class))
    return "\n".join(
        f"  {name:<{width}}  {'-' if iou is None else format(iou, '.2f'):>6}" for name, iou in per_class.items()
    )


def main(args: argparse.Namespace) -> int:
    if args.resume and not args.out:
        raise UserError("--resume needs --out FILE: the counts are kept beside it while it runs")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    # The data set comes first: its errors should not wait for the weights.
    dataset = open_dataset(args.dataset, args.root, args.split)
    keep = f"{args.out}.partial" if args.out else None
    with joined_ranks(args.device) as device:
        model = load_on_device(args.weights, device)
        settings = model.inference.with_options(**options_of(args))
        segmenter = segmenter_for(model, dataset, settings, args.background_threshold, args.batch)
        result = evaluate(segmenter, dataset, args.limit, True, args.predictions, keep, args.resume)
        rank = ranks.rank()
    if rank > 0:
        return 0
    result["settings"]["weights"] = args.weights
    print(class_table(result["per_class"]))
    print(f"mIoU {result['mIoU']:.2f} % over {result['images']} photos")
    if "frequent_mIoU" in result:
        frequent = sum(photos >= FREQUENT for photos in result["per_class_images"].values())
        print(f"  the {frequent} classes in at least {FREQUENT} photos: {result['frequent_mIoU']:.2f} %")
    if "all_background_mIoU" in result:
        print(f"  all background: {result['all_background_mIoU']:.2f} %")
    print(f"  segments with their best class: {result['oracle_mIoU']:.2f} %")
    if args.out:
        with saving(args.out):
            write_json(args.out, result)
    if args.pictures:
        dataset_figure(segmenter, dataset, args.pictures)
    return 0
