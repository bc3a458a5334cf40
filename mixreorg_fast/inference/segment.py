"""Segment photos by class names: an overlay with a legend for each, and the share of every class."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Iterable
from os.path import lexists
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..files import read_json, saving, write_json
from ..images import find_images
from ..names import MASK_CLASSES, parse_classes, read_classes
from .fonts import drawable
from .options import WEIGHTS_HELP, add_options, load_on_device, options_of
from .overlay import save_labels, save_picture

AREAS = "areas.json"
# Notes in the PNGs that this command writes: the program, and a digest of the photo's path.
WRITER, PHOTO = ("Software", "mixreorg segment"), "Photo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="pictures, or folders of pictures")
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--classes", metavar="NAMES", help='such as "cat, dog, sofa"')
    names.add_argument("--classes-file", metavar="FILE", help="a name per line; lines that begin with # are comments")
    parser.add_argument("--weights", required=True, metavar="DIR", help=WEIGHTS_HELP)
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
    outputs = Outputs(Path(args.out), photos, args.mask)
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
        place, about = outputs.place(photo, within), dict([WRITER, (PHOTO, _digest(photo))])
        save_picture(place, found.overlay(), about=about)
        if args.mask:
            save_labels(_mask_of(place), found.labels, found.has_background, about)
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

    Overlays and masks of earlier runs are left out of folders. Raises a UserError as
    :func:`~mixreorg_fast.images.find_images` does, and where no other photo is left.
    """
    found: dict[Path, Path] = {}
    for source in map(Path, sources):
        for photo in find_images(source, recursive):
            if not source.is_dir() or _written_here(photo) is None:
                found.setdefault(photo, photo.relative_to(source).parent)
    if not found:
        raise UserError(f"{', '.join(sources)}: no pictures but those that this command wrote")
    return found


class Outputs:
    """The folder of overlays, masks and ``areas.json``: nothing is written over a file of another origin.

    `folder` is made when first written to. `photos`: all that will be segmented. Raises a UserError if `folder` is a
    file, or if this command did not write its ``areas.json``.
    """

    def __init__(self, folder: Path, photos: Iterable[Path], masks: bool) -> None:
        self.folder, self.masks, self._listing = folder, masks, folder / AREAS
        self._taken = {path.resolve() for path in photos}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: a file; a folder was expected")
        self.areas()

    def place(self, photo: Path, within: Path) -> Path:
        """Where the overlay of `photo` goes, in the sub-folder `within`.

        That is NAME.png, or NAME_segmented.png beside a NAME.png that this command did not write; numbered, if other
        photos' overlays are there. An earlier overlay of the same photo is replaced.
        """

        def places(name: str) -> list[Path]:
            overlay = self.folder / within / f"{name}.png"
            return [overlay, _mask_of(overlay)] if self.masks else [overlay]

        def free(place: Path) -> bool:
            return place.resolve() not in self._taken and (not lexists(place) or _written_here(place) == _digest(photo))

        name = photo.stem
        if any(lexists(place) and _written_here(place) is None for place in places(name)):
            name = f"{name}_segmented"
        numbered = (places(name if number == 1 else f"{name}_{number}") for number in itertools.count(1))
        found = next(candidates for candidates in numbered if all(map(free, candidates)))
        self._taken |= {place.resolve() for place in found}
        return found[0]

    def areas(self) -> dict[str, dict[str, float]]:
        """The shares noted so far, by photo. Raises a UserError if ``areas.json`` is damaged or of another program."""
        if not self._listing.exists():
            return {}
        try:
            noted = read_json(self._listing)
        except (UserError, OSError) as error:
            raise UserError(f"{error}; move it away, or name another --out") from None
        if not all(isinstance(shares, dict) for shares in noted.values()):
            raise UserError(f"{self._listing}: not the areas of photos; move it away, or name another --out")
        return noted

    def note(self, photo: Path, shares: dict[str, float]) -> None:
        """Add the shares of a photo to ``areas.json``, which may have been written to meanwhile."""
        with saving(self._listing):
            write_json(self._listing, self.areas() | {str(photo): shares})


def _mask_of(overlay: Path) -> Path:
    return overlay.with_name(f"{overlay.stem}_mask.png")


def _written_here(path: Path) -> str | None:
    """The :func:`_digest` of the photo that the picture at `path` shows; None: this command did not write it."""
    if path.suffix.lower() != ".png":
        return None
    try:
        with Image.open(path) as picture:
            return picture.info.get(PHOTO, "") if picture.info.get(WRITER[0]) == WRITER[1] else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _digest(photo: Path) -> str:
    """A digest of the photo's path."""
    return hashlib.sha256(str(photo.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
