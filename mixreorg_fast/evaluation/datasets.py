"""Photos with masks, in the plain layout or in one of the layouts of ``layouts.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError, nearest
from ..images import SUFFIXES, load_image
from .layouts import LAYOUTS, Layout
from .metrics import IGNORE, IGNORE_16


class Sample(NamedTuple):
    """A photo with its mask."""

    image: Image.Image  # RGB
    mask: np.ndarray  # [H, W], class ids and `IGNORE` in uint8; of more than 255 classes, ids and `IGNORE_16` in int32
    name: str


KINDS = ("plain", *LAYOUTS)


@dataclass(eq=False)
class SegmentationDataset:
    """Photos and masks by index; files are read when asked for."""

    kind: str  # kind, root and split are those that `open_dataset` took
    root: Path
    split: str
    layout: Layout
    names: list[str]  # one per photo, in the order of the split
    photos: dict[str, Path]  # by name, of other splits too
    masks: Path  # the folder of masks

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of mask ids."""
        return self.layout.classes

    @property
    def has_background(self) -> bool:
        """Whether id 0 is "background", which takes no prompt."""
        return self.classes[0] == "background"

    @property
    def background_threshold(self) -> float | None:
        """The usual background threshold of this dataset; None without a background."""
        return self.layout.threshold if self.has_background else None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The classes that are asked for by name: all but the background."""
        return self.classes[1:] if self.has_background else self.classes

    def __len__(self) -> int:
        return len(self.names)

    def spread(self, count: int | None) -> list[int]:
        """Indices of `count` photos evenly spread over the split; None: of all."""
        count = len(self) if count is None else min(count, len(self))
        return [number * len(self) // count for number in range(count)]

    def __getitem__(self, index: int) -> Sample:
        """Read one photo and its mask. Raises a UserError if a file is missing or damaged, if mask and photo differ in
        size, or if an id has no class."""
        name = self.names[index]
        photo, mask_path, remap = self._paths(name)
        image = load_image(photo)
        mask, ignore = _read_mask(mask_path), IGNORE if len(self.classes) <= IGNORE else IGNORE_16
        if mask.shape == image.size and image.width != image.height:
            # The mask was drawn on the photo as stored, without regard to its EXIF orientation.
            image = load_image(photo, upright=False)
        if image.size != (mask.shape[1], mask.shape[0]):
            raise UserError(
                f"{mask_path}: mask of {mask.shape[1]} x {mask.shape[0]} for a photo of {image.width} x {image.height} "
                f"({photo})"
            )
        if remap is not None and mask.min() >= 0 and mask.max() < len(remap):
            mask = remap[mask]
        unknown = sorted(set(np.unique(mask).tolist()) - set(range(len(self.classes))) - {ignore})
        if unknown:
            raise UserError(
                f"{mask_path}: id {unknown[0]} has no class; expected 0 to {len(self.classes) - 1} "
                f"('{self.classes[-1]}') or {ignore} for ignore"
            )
        return Sample(image, mask.astype(np.uint8 if ignore == IGNORE else np.int32), name)

    def _paths(self, name: str) -> tuple[Path, Path, np.ndarray | None]:
        """The photo, its mask, and what turns the mask's values into class ids."""
        if name not in self.photos:
            raise UserError(f"no photo {name} in {self.root} ({self.kind}){nearest(name, self.photos, others=False)}")
        suffixes = self.layout.mask_suffixes
        for suffix, remap in suffixes.items():
            if (mask := self.masks / f"{name}{suffix}").is_file():
                return self.photos[name], mask, remap
        choices = " or ".join(f"{name}{suffix}" for suffix in suffixes)
        close = nearest(choices, (path.name for path in self.masks.iterdir()), others=False)
        raise UserError(f"no mask {choices} in {self.masks}{self.layout.setup}{close}")


def open_dataset(kind: str, root: str | Path, split: str = "val") -> SegmentationDataset:
    """The dataset of layout `kind`, which docs/evaluate.md describes, under `root`: its folder or the parent of that.

    Raises:
        UserError: unknown kind or split, missing folder or file list, an empty split, doubled class names.
    """
    if kind not in KINDS:
        raise UserError(f"unknown dataset layout '{kind}'{nearest(kind, KINDS)}")
    root = Path(root)
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise UserError(f"no dataset folder {root}{nearest(root.name, siblings)}; docs/evaluate.md lists the layouts")
    layout = _plain(root) if kind == "plain" else LAYOUTS[kind]
    folder = layout.split_folders.get(split, split)
    home = next((root / home for home in layout.homes if (root / home / Path(layout.images).parts[0]).is_dir()), None)
    if home is None:
        raise UserError(f"no folder {root / layout.images.format(split=folder)}, where {kind} keeps its photos")
    if layout.class_file:
        expected = f"the names of its {layout.class_count} classes in the order of their ids"
        classes = _class_names(home / layout.class_file, expected, layout.class_count)
        layout = replace(layout, classes=classes)
    images, masks = (home / part.format(split=folder) for part in (layout.images, layout.masks))
    if layout.split_file:
        listed = _split_lines(home / layout.split_file.format(split=split), split)
    elif not images.is_dir():
        splits = {v: k for k, v in layout.split_folders.items()}
        there = [splits.get(p.name, p.name) for p in sorted(images.parent.iterdir()) if p.is_dir()]
        raise UserError(f"no folder {images} for split '{split}'{nearest(split, there)}")
    # One listing instead of a look per photo and suffix.
    photos: dict[str, Path] = {}
    for path in sorted(images.rglob("*")):
        if suffix := next((s for s in layout.image_suffixes if path.name.lower().endswith(s.lower())), None):
            photos[path.relative_to(images).as_posix()[: -len(suffix)]] = path
    if not photos:
        raise UserError(f"no photos (*{' *'.join(layout.image_suffixes)}) under {images}")
    if not masks.is_dir():
        raise UserError(f"no folder {masks}, where {kind} keeps its masks{layout.setup}")
    names = list(photos)
    if layout.split_file:  # some lists carry the suffix, or further columns
        names = [line if line in photos else line.split()[0].removesuffix(".jpg") for line in listed]
    return SegmentationDataset(kind, root, split, layout, names, photos, masks)


def _plain(root: Path) -> Layout:
    for folder in ("images", "masks"):
        if not (root / folder).is_dir():
            raise UserError(f"no folder {root / folder}: the plain layout has images/, masks/, classes.txt, splits/")
    classes = _class_names(root / "classes.txt", "one class name per line, the first of mask id 0")
    if len(classes) > IGNORE:
        raise UserError(f"{root / 'classes.txt'}: {len(classes)} classes; masks of 8 bits hold at most {IGNORE}")
    # Own data has no usual threshold; VOC's is taken.
    return Layout(classes, "images", "masks", "splits/{split}.txt", image_suffixes=SUFFIXES, threshold=0.95)


def _class_names(path: Path, expected: str, count: int | None = None) -> tuple[str, ...]:
    """One name per line; where a `count` is expected, also lines ``NUMBER: NAME``, as Pascal Context numbers them."""
    lines = _lines(path, expected)
    if count is not None:
        numbered = [match for match in map(re.compile(r"(\d+)\s*:\s*(.+)").fullmatch, lines) if match]
        lines = [match[2] for match in sorted(numbered, key=lambda match: int(match[1]))] or lines
        if len(lines) != count:
            raise UserError(f"{path}: {len(lines)} names ({expected})")
    if doubled := next((name for i, name in enumerate(lines) if name in lines[:i]), None):
        raise UserError(f"{path}: class '{doubled}' is named twice")
    return tuple(lines)


def _read_mask(path: Path) -> np.ndarray:
    """The values of a grey or palette picture: integers ``[H, W]``. A damaged or coloured one raises a UserError."""
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("P", "L", "1") and not mask.mode.startswith("I"):
                raise UserError(f"{path}: a mask holds class ids (grey or palette PNG), got {mask.mode}")
            ids = np.asarray(mask)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: damaged mask ({error})") from None
    return ids.astype(np.uint8) if ids.dtype == bool else ids


def _split_lines(path: Path, split: str) -> list[str]:
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise UserError(f"no split '{split}': {path} is missing{nearest(split, there)}")
    return _lines(path, "one photo name per line")


def _lines(path: Path, expected: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError:
        raise UserError(f"no file {path} ({expected})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text ({expected})") from None
    lines = [line.strip() for line in lines]
    if not lines:
        raise UserError(f"{path} is empty ({expected})")
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty ({expected})")
    return lines
