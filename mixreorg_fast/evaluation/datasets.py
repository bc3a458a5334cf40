"""Photos with masks, in the plain layout or in one of the layouts of ``layouts.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError, nearest
from ..images import load_image
from .layouts import LAYOUTS, Layout
from .metrics import IGNORE

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Sample(NamedTuple):
    """A photo (RGB), its mask (uint8 ``[H, W]``, class ids and `IGNORE`) and its name."""

    image: Image.Image
    mask: np.ndarray
    name: str


KINDS = ("plain", *LAYOUTS)


class SegmentationDataset:
    """Photos and masks by index; files are read when asked for.

    Attributes:
        kind, root, split: as given to :func:`open_dataset`.
        classes: names in the order of mask ids.
        has_background: whether id 0 is "background", which takes no prompt.
        background_threshold: the usual one of this data set; None where there is no background.
        names: one per photo, in the order of the split.
    """

    def __init__(
        self,
        kind: str,
        root: Path,
        split: str,
        classes: tuple[str, ...],
        names: list[str],
        paths: Callable[[str], tuple[Path, Path, np.ndarray | None]],
        background_threshold: float | None,
    ) -> None:
        self.kind, self.root, self.split, self.classes, self.names = kind, root, split, classes, names
        self.has_background = classes[0] == "background"
        self.background_threshold = background_threshold if self.has_background else None
        self._paths = paths

    @property
    def prompts(self) -> tuple[str, ...]:
        """The classes that are asked for by name: all but the background."""
        return self.classes[1:] if self.has_background else self.classes

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """Read one photo and its mask.

        Raises:
            UserError: a missing or damaged file, a mask of another size than its photo, an id without a class.
        """
        name = self.names[index]
        photo, mask_path, remap = self._paths(name)
        image = load_image(photo)
        mask = _read_mask(mask_path)
        if image.size == mask.shape != image.size[::-1]:
            # Some masks were drawn on the photo as stored, without regard to its EXIF orientation.
            image = load_image(photo, upright=False)
        if image.size != (mask.shape[1], mask.shape[0]):
            raise UserError(
                f"{mask_path}: mask of {mask.shape[1]} x {mask.shape[0]} for a photo of {image.width} x {image.height} "
                f"({photo})"
            )
        if remap is not None:
            mask = remap[mask]
        unknown = sorted(set(np.unique(mask).tolist()) - set(range(len(self.classes))) - {IGNORE})
        if unknown:
            raise UserError(
                f"{mask_path}: id {unknown[0]} has no class; expected 0 to {len(self.classes) - 1} "
                f"('{self.classes[-1]}') or {IGNORE} for ignore"
            )
        return Sample(image, mask, name)


def open_dataset(kind: str, root: str | Path, split: str = "val") -> SegmentationDataset:
    """The data set of layout `kind` under `root`.

    Layouts:
        plain: ``images/NAME.jpg`` (or .png, .webp), ``masks/NAME.png``, ``classes.txt`` (line t names mask id t, from
            0; a first line "background" takes no prompt), ``splits/SPLIT.txt`` (names, one per line).
        voc2012, context (60 classes), context59, coco_object, coco_stuff, ade20k, cityscapes: as downloaded, or as
            mmsegmentation's and GroupViT's converters leave them. `root` is the data set's folder or its parent.

    Raises:
        UserError: unknown kind or split, missing folder or file list, an empty split, doubled class names.
    """
    if kind not in KINDS:
        raise UserError(f"unknown data set layout '{kind}'{nearest(kind, KINDS)}")
    root = Path(root)
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise UserError(f"no data set folder {root}{nearest(root.name, siblings)}; docs/evaluate.md lists the layouts")
    return _open_plain(root, split) if kind == "plain" else _open_layout(kind, LAYOUTS[kind], root, split)


def _open_plain(root: Path, split: str) -> SegmentationDataset:
    for folder in ("images", "masks"):
        if not (root / folder).is_dir():
            raise UserError(f"no folder {root / folder}: the plain layout has images/, masks/, classes.txt, splits/")
    classes = tuple(_lines(root / "classes.txt", "one class name per line, the first of mask id 0"))
    if len(classes) > IGNORE:
        raise UserError(f"{root / 'classes.txt'}: {len(classes)} classes; masks of 8 bits hold at most {IGNORE}")
    doubled = next((name for i, name in enumerate(classes) if name in classes[:i]), None)
    if doubled:
        raise UserError(f"{root / 'classes.txt'}: class '{doubled}' is named twice")
    listed = _split_names(root / "splits" / f"{split}.txt", split)
    # One listing instead of a guess per suffix and photo.
    photos = {p.stem: p for p in sorted((root / "images").iterdir()) if p.suffix.lower() in PHOTO_SUFFIXES}

    def paths(name: str) -> tuple[Path, Path, None]:
        if name not in photos:
            raise UserError(f"no photo {root / 'images' / name} (.jpg, .png or .webp){_close(name, photos)}")
        return photos[name], root / "masks" / f"{name}.png", None

    # There is no usual threshold for own data: VOC's.
    return SegmentationDataset("plain", root, split, classes, listed, paths, 0.95)


def _open_layout(kind: str, layout: Layout, root: Path, split: str) -> SegmentationDataset:
    folder = layout.split_folders.get(split, split)
    home = next((root / home for home in layout.homes if (root / home / Path(layout.images).parts[0]).is_dir()), None)
    if home is None:
        raise UserError(f"no folder {root / layout.images.format(split=folder)}, where {kind} keeps its photos")
    images, masks = (home / part.format(split=folder) for part in (layout.images, layout.masks))
    if layout.split_file:
        listed = _split_names(home / layout.split_file.format(split=split), split)
    else:
        if not images.is_dir():
            splits = {v: k for k, v in layout.split_folders.items()}
            there = [splits.get(p.name, p.name) for p in sorted(images.parent.iterdir()) if p.is_dir()]
            raise UserError(f"no folder {images} for split '{split}'{nearest(split, there)}")
        suffix = layout.image_suffix
        found = (p.relative_to(images).as_posix() for p in images.rglob(f"*{suffix}"))
        listed = sorted(name.removesuffix(suffix) for name in found)
        if not listed:
            raise UserError(f"no photos (*{suffix}) under {images}")
    if not masks.is_dir():
        raise UserError(f"no folder {masks}, where {kind} keeps its masks{layout.setup}")

    def paths(name: str) -> tuple[Path, Path, np.ndarray | None]:
        photo = images / f"{name}{layout.image_suffix}"
        if not photo.is_file():
            raise UserError(f"no photo {photo}{_close(photo.name, (p.name for p in images.iterdir()))}")
        for suffix, remap in layout.mask_suffixes.items():
            if (masks / f"{name}{suffix}").is_file():
                return photo, masks / f"{name}{suffix}", remap
        choices = " or ".join(f"{name}{suffix}" for suffix in layout.mask_suffixes)
        raise UserError(f"no mask {choices} in {masks}{layout.setup}")

    return SegmentationDataset(kind, root, split, layout.classes, listed, paths, layout.threshold)


def _read_mask(path: Path) -> np.ndarray:
    """Class ids ``[H, W]`` of a grey or palette PNG.

    Raises:
        UserError: missing, damaged, or a picture with colours instead of ids.
    """
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("P", "L", "1") and not mask.mode.startswith("I"):
                raise UserError(f"{path}: a mask holds class ids (grey or palette PNG), got {mask.mode}")
            ids = np.asarray(mask)
    except FileNotFoundError:
        siblings = (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise UserError(f"no mask {path}{_close(path.name, siblings)}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: damaged mask ({error})") from None
    if ids.dtype != np.uint8 and ids.size and not (ids.min() >= 0 and ids.max() <= 255):
        raise UserError(f"{path}: id {ids.max()} is out of range (0 to 255)")
    return ids.astype(np.uint8)


def _split_names(path: Path, split: str) -> list[str]:
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise UserError(f"no split '{split}': {path} is missing{nearest(split, there)}")
    # Some lists carry further columns, or the suffix.
    return [line.split()[0].removesuffix(".jpg") for line in _lines(path, "one photo name per line")]


def _lines(path: Path, expected: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise UserError(f"no file {path} ({expected})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text ({expected})") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty ({expected})")
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty ({expected})")
    return lines


def _close(name: str, choices: object) -> str:
    """The nearest file name, if one is near: a folder of thousands is not listed."""
    hint = nearest(name, choices)  # type: ignore[arg-type]
    return hint if "did you mean" in hint else ""
