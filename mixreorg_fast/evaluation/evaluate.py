"""Score a model zero-shot on a segmentation dataset: mIoU, a table per class, pictures.

mixreorg evaluate --model DIR --dataset voc2012 --root VOCdevkit     weights of ours
mixreorg evaluate --model CIDAS/clipseg-rd64-refined …               Hugging Face's CLIPSeg or GroupViT
mixreorg evaluate --model module:function …                          a function of photo and class names
"""

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
from ..inference.options import WEIGHTS_HELP, add_options, options_of
from .datasets import KINDS, open_dataset
from .metrics import FREQUENT
from .pictures import dataset_figure
from .predictors import open_model
from .zero_shot import THRESHOLDS, evaluate

FIGURES = {  # in words -> in eval.json
    "all background": "all_background_mIoU",
    "whole photos after their best class": "whole_photo_mIoU",
    "segments with their best class": "oracle_mIoU",
    "pixel accuracy": "pixel_accuracy",
    "mean accuracy": "mean_accuracy",
    "boundary mIoU": "boundary_mIoU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about = f"{WEIGHTS_HELP}; CLIPSeg of Hugging Face's, by folder or name; or module:function"
    parser.add_argument("--model", "--weights", required=True, metavar="MODEL", help=about)
    parser.add_argument("--dataset", default="plain", metavar="KIND", help=f"folder layout: {', '.join(KINDS)}")
    parser.add_argument("--root", required=True, metavar="FOLDER", help="the dataset's folder")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--out", metavar="FILE", help="where the scores go as JSON")
    parser.add_argument("--pictures", metavar="FILE", help="PNG of some photos, truths, predictions and segments")
    parser.add_argument("--predictions", metavar="FOLDER", help="the labels of every photo, as palette PNGs")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")
    parser.add_argument("--limit", type=int, metavar="N", help="score only N photos, spread over the split")
    add_options(parser, decoding="groupvit", sweep=True)


@contextlib.contextmanager
def joined_ranks(device: str | None) -> Iterator[str | None]:
    """Join the ranks that torchrun or deepspeed started, if any; gives this one's device, chosen by
    :func:`mixreorg_fast.devices.choose`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    chosen = devices.choose(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    ranks.wait_patiently()
    yield str(chosen)
    # Skipped after an error: the other ranks wait for this one, until the launcher ends them.
    dist.destroy_process_group()


def main(args: argparse.Namespace) -> int:
    if args.resume and not args.out:
        raise UserError("--resume needs --out FILE: the counts are kept beside it while it runs")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    # The dataset comes first: its errors should not wait for the weights.
    dataset = open_dataset(args.dataset, args.root, args.split)
    keep = f"{args.out}.partial" if args.out else None
    sweep, options = args.background_threshold == "sweep", options_of(args)
    if sweep:
        options["background_threshold"] = None
        if not dataset.has_background:
            raise UserError(f"--background-threshold sweep: {dataset.kind} at {args.root} has no class 'background'")
    with joined_ranks(args.device) as device:
        segmenter = open_model(args.model, dataset, options, device, args.batch)
        result = evaluate(
            segmenter, dataset, args.limit, predictions=args.predictions, keep=keep, resume=args.resume, sweep=sweep
        )
        rank = ranks.rank()
    if rank > 0:
        return 0
    if "model" not in result["settings"]:
        result["settings"]["weights"] = args.model
    width = max(map(len, result["per_class"]))
    for name, iou in result["per_class"].items():
        print(f"  {name:<{width}}  {'-' if iou is None else format(iou, '.2f'):>6}")
    print(f"mIoU {result['mIoU']:.2f} % over {result['images']} photos")
    if "frequent_mIoU" in result:
        frequent = sum(photos >= FREQUENT for photos in result["per_class_images"].values())
        print(f"  the {frequent} classes in at least {FREQUENT} photos: {result['frequent_mIoU']:.2f} %")
    for name, figure in FIGURES.items():
        if figure in result:
            print(f"  {name}: {result[figure]:.2f} %")
    if sweep:
        best, used = result["best_threshold"], result["settings"]["background_threshold"]
        at_best = result["threshold_sweep"][f"{best:.2f}"]
        print(f"  best of {len(THRESHOLDS)} background thresholds: {best:.2f} with {at_best:.2f} % (used: {used})")
    if args.out:
        with saving(args.out):
            write_json(args.out, result)
    if args.pictures:
        dataset_figure(segmenter, dataset, args.pictures)
    return 0
