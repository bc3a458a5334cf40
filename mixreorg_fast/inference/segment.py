"""Segment photos by class names: an overlay with a legend for each, and the share of every class."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import UserError
from ..images import find_images
from ..names import MASK_CLASSES, parse_classes, read_classes
from .fonts import drawable
from .options import add_options, load_on_device, options_of
from .outputs import AREAS, Outputs, mask_of, notes, written_here
from .overlay import save_labels, save_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="pictures, or folders of pictures")
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--classes", metavar="NAMES", help='such as "cat, dog, sofa"')
    names.add_argument("--classes-file", metavar="FILE", help="a name per line; lines that begin with # are comments")
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder with model.safetensors")
    parser.add_argument("--out", required=True, metavar="FOLDER", help=f"gets NAME.png per photo, and {AREAS}")
    parser.add_argument("--recursive", action="store_true", help="take the sub-folders of folders too")
    parser.add_argument("--mask", action="store_true", help="also NAME_mask.png, whose values are class numbers")
    add_options(parser, decoding="direct")


def main(args: argparse.Namespace) -> int:
    if args.classes_file is not None:
        classes = read_classes(args.classes_file)
    else:
        classes = parse_classes(args.classes, "--classes", most=MASK_CLASSES)
    photos = find_photos(args.photos, args.recursive)
    outputs = Outputs(Path(args.out), list(photos), args.mask)
    model = load_on_device(args.weights, args.device)
    segmenter = model.segmenter(classes, batch=args.batch, **options_of(args))
    if boxes := [name for name in classes if drawable(name) != name]:
        print(f"no font here has all of '{boxes[0]}': legends show '{drawable(boxes[0])}'", file=sys.stderr, flush=True)
    failures = 0
    for photo, within in photos.items():
        try:
            found = segmenter.photo(photo)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            failures += 1
            continue
        place, about = outputs.place(photo, within), notes(photo)
        save_picture(place, found.overlay(), about=about)
        if args.mask:
            save_labels(mask_of(place), found.labels, found.has_background, about)
        # After each photo, so that an interrupted run has reported its photos.
        areas = found.areas
        outputs.note(photo, areas)
        largest = sorted((name for name in areas if areas[name] > 0), key=lambda name: areas[name], reverse=True)
        print(f"{photo}: {', '.join(f'{name} {areas[name]:.0%}' for name in largest)} ({place})", flush=True)
    if failures:
        print(f"error: {failures} of {len(photos)} pictures were skipped", file=sys.stderr, flush=True)
    return 2 if failures else 0


def find_photos(sources: list[str], recursive: bool) -> dict[Path, Path]:
    """The photos to segment, each with its place below the folder that was named for it.

    Overlays and masks of earlier runs are left out of folders.

    Raises:
        UserError: as :func:`~mixreorg_fast.images.find_images`; no photo but those.
    """
    found: dict[Path, Path] = {}
    for source in map(Path, sources):
        for photo in find_images(source, recursive):
            if not source.is_dir():
                found.setdefault(photo, Path())
            elif written_here(photo) is None:
                found.setdefault(photo, photo.relative_to(source).parent)
    if not found:
        raise UserError(f"{', '.join(sources)}: no pictures but those that this command wrote")
    return found
