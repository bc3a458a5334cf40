"""Segment photos by class names: an overlay with a legend for each, and the share of every class."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import write_json
from ..models.images import find_images, load_image
from ..models.prompts import text_classifier
from .evaluate import add_view_arguments, load_on_device, settings_from
from .pictures import class_palette, label_counts, overlay, save_labels, save_png, saving
from .zero_shot import Segmenter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="pictures, or folders of pictures")
    parser.add_argument("--classes", required=True, metavar="NAMES", help='such as "cat, dog, sofa"')
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder with model.safetensors")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="gets NAME.png per photo and areas.json")
    parser.add_argument("--mask", action="store_true", help="also NAME_mask.png, whose values are class numbers")
    add_view_arguments(parser, decoding="direct")


def main(args: argparse.Namespace) -> int:
    classes = parse_classes(args.classes)
    photos = find_images(args.photos)
    settings = settings_from(args)
    model = load_on_device(args.weights, args.device)
    segmenter = Segmenter(model, text_classifier(model, model.tokenizer, classes, settings.templates), settings)
    background = settings.background_threshold is not None
    names = ["background", *classes] if background else classes
    palette = class_palette(background)
    out, areas, failures = Path(args.out), {}, 0
    for photo, name in zip(photos, output_names(photos), strict=True):
        try:
            image = load_image(photo)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            failures += 1
            continue
        labels = segmenter.segment(image).labels.cpu()
        save_png(out / f"{name}.png", overlay(image, labels, names, palette))
        if args.mask:
            save_labels(out / f"{name}_mask.png", labels, background)
        shares = label_counts(labels, len(names)) / labels.numel()
        areas[str(photo)] = dict(zip(names, shares.tolist(), strict=True))
        # After each photo, so that an interrupted run has told what it did.
        with saving(out / "areas.json"):
            write_json(out / "areas.json", areas)
        found = ", ".join(f"{names[t]} {shares[t]:.0%}" for t in np.argsort(-shares, kind="stable") if shares[t] > 0)
        print(f"{photo}: {found}", flush=True)
    if failures:
        print(f"error: {failures} of {len(photos)} pictures were skipped", file=sys.stderr, flush=True)
    return 2 if failures else 0


def parse_classes(text: str, source: str = "--classes") -> list[str]:
    """Names between commas; errors name their `source`.

    Raises:
        UserError: none, an empty one, one named twice, or more than a mask of 8 bits can hold.
    """
    classes = [" ".join(name.split()) for name in text.split(",")]
    if not all(classes):
        raise UserError(f"{source} '{text}': expected names between commas, such as \"cat, dog, sofa\"")
    doubled = next((name for i, name in enumerate(classes) if name in classes[:i]), None)
    if doubled:
        raise UserError(f"{source} '{text}': '{doubled}' is named twice")
    if len(classes) > 254:
        raise UserError(f"{source}: {len(classes)} classes, at most 254")
    return classes


def output_names(photos: list[Path]) -> list[str]:
    """A file name for each photo: its stem, numbered where several photos share it."""
    names: list[str] = []
    for photo in photos:
        name, number = photo.stem, 2
        while name in names:
            name, number = f"{photo.stem}_{number}", number + 1
        names.append(name)
    return names
