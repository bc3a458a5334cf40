"""Where `mixreorg segment` writes: never over a photo, nor over anything else that it did not write itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..files import saving, write_json

AREAS = "areas.json"
# Notes in the PNGs that this command writes: by whom, and a digest of the photo's place.
WRITER, PHOTO = ("Software", "mixreorg segment"), "Photo"


class Outputs:
    """The folder of overlays, masks and ``areas.json``.

    Args:
        folder: is made when first written to.
        photos: all that will be segmented; nothing is written over them.
        masks: whether masks are written too.
    Raises:
        UserError: `folder` is a file, or its ``areas.json`` is not one of this command.
    """

    def __init__(self, folder: Path, photos: Sequence[Path], masks: bool) -> None:
        self.folder, self.masks = folder, masks
        self._taken = {path.resolve() for path in photos}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: a file; a folder was expected")
        self.areas()

    def place(self, photo: Path, within: Path = Path()) -> Path:
        """Where the overlay of `photo` goes, in the sub-folder `within`.

        That is NAME.png, or NAME_segmented.png beside a NAME.png that this command did not write; numbered, if other
        photos' overlays are there. An earlier overlay of the same photo is replaced.
        """
        places, name = self._places(within, photo.stem), photo.stem
        if any(_exists(place) and written_here(place) is None for place in places):
            name = f"{name}_segmented"
        for number in count(1):
            places = self._places(within, name if number == 1 else f"{name}_{number}")
            if all(self._free(place, photo) for place in places):
                self._taken |= {place.resolve() for place in places}
                return places[0]
        raise AssertionError("numbers do not end")

    def _places(self, within: Path, name: str) -> list[Path]:
        overlay = self.folder / within / f"{name}.png"
        return [overlay, mask_of(overlay)] if self.masks else [overlay]

    def _free(self, place: Path, photo: Path) -> bool:
        return place.resolve() not in self._taken and (not _exists(place) or written_here(place) == _digest(photo))

    def areas(self) -> dict[str, dict[str, float]]:
        """The shares by photo that are noted so far.

        Raises:
            UserError: ``areas.json`` is damaged or not of this command.
        """
        path = self.folder / AREAS
        try:
            noted = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not JSON"
            raise UserError(f"{path}: cannot be read ({reason}); move it away, or name another --out") from None
        if not isinstance(noted, dict) or not all(isinstance(shares, dict) for shares in noted.values()):
            raise UserError(f"{path}: not the areas of photos; move it away, or name another --out")
        return noted

    def note(self, photo: Path, shares: dict[str, float]) -> None:
        """Add the shares of a photo to ``areas.json``, which may have been written to meanwhile."""
        path = self.folder / AREAS
        with saving(path):
            write_json(path, self.areas() | {str(photo): shares})


def mask_of(overlay: Path) -> Path:
    return overlay.with_name(f"{overlay.stem}_mask.png")


def notes(photo: Path) -> dict[str, str]:
    """What the pictures made of `photo` say about themselves."""
    return dict([WRITER, (PHOTO, _digest(photo))])


def written_here(path: Path) -> str | None:
    """The digest of the photo that the picture at `path` was made of; None: this command did not write it."""
    if path.suffix.lower() != ".png":
        return None
    try:
        with Image.open(path) as picture:
            return picture.info.get(PHOTO, "") if picture.info.get(WRITER[0]) == WRITER[1] else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _digest(photo: Path) -> str:
    return hashlib.sha256(str(photo.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
