"""Pictures for people: segmentations beside their truth, overlays with a legend, mixed and restored images."""

from __future__ import annotations

import colorsys
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import UserError
from ..files import atomic_path
from ..models.images import to_pixels
from .metrics import IGNORE

INK, PAPER, UNKNOWN = (30, 30, 30), (255, 255, 255), (224, 224, 192)  # the last is VOC's colour for ignored pixels
CELL, GAP = 224, 8
STRIP = 1 << 22  # pixels blended at once
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turns what the file system refuses while `path` is written into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Write `picture` at `path`, whole or not at all; folders are made.

    Raises:
        UserError: the place cannot be written.
    """
    with saving(path), atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


class Row(NamedTuple):
    """One line of :func:`segmentation_figure`; the maps are integer arrays ``[H, W]``."""

    image: Image.Image
    truth: Any
    prediction: Any
    segments: Any


def voc_palette(shift: int = 0) -> np.ndarray:
    """Pascal VOC's colours, uint8 ``[256, 3]``: the bits of id + `shift`, dealt to the channels from the top down."""
    ids = np.arange(256) + shift
    colours = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (ids >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def class_palette(has_background: bool) -> np.ndarray:
    """Colours by label; black is kept for the background, so without one the first class takes VOC's second colour."""
    palette = voc_palette(0 if has_background else 1)
    palette[IGNORE] = UNKNOWN
    return palette


def segment_palette() -> np.ndarray:
    """Colours by segment number, neighbours far apart in hue; uint8 ``[256, 3]``."""
    golden = 0.618034
    hues = [colorsys.hsv_to_rgb(i * golden % 1, 0.65 if i % 2 else 0.9, 0.95 if i % 3 else 0.75) for i in range(256)]
    return (np.array(hues) * 255).astype(np.uint8)


def colourise(labels: Any, palette: np.ndarray) -> Image.Image:
    """Labels ``[H, W]`` as an RGB picture; numbers past 255 begin again."""
    return Image.fromarray(palette[np.asarray(labels).astype(np.uint8)])


def save_labels(path: str | Path, labels: Tensor, has_background: bool) -> None:
    """Labels ``[H, W]`` (uint8) as a palette PNG: its values are the labels, its colours the classes'."""
    picture = Image.fromarray(labels.cpu().numpy())
    picture.putpalette(class_palette(has_background).tobytes())
    save_png(path, picture)


def blend(
    photo: Image.Image, labels: Any, palette: np.ndarray, opacity: float = 0.55, onto: Image.Image | None = None
) -> Image.Image:
    """`photo` under the colours of `labels`; black (the background) leaves it as it is.

    Drawn at the top left of `onto`, or of a new picture, in strips: a photo of a hundred megapixels costs no more than
    its result.
    """
    labels, out = np.asarray(labels), onto or Image.new("RGB", photo.size)
    rows = max(1, STRIP // photo.width)
    for top in range(0, photo.height, rows):
        part = photo.crop((0, top, photo.width, min(top + rows, photo.height)))
        colours = palette[labels[top : top + rows].astype(np.uint8)]
        share = np.where(colours.any(axis=2, keepdims=True), np.float32(opacity), np.float32(0))
        mixed = np.asarray(part) * (1 - share) + colours * share
        out.paste(Image.fromarray(mixed.round().astype(np.uint8)), (0, top))
    return out


def label_counts(labels: Any, count: int) -> np.ndarray:
    """Pixels of each label 0..count-1, int64 ``[count]``; in strips, since NumPy counts in copies of 8 bytes each."""
    labels = np.asarray(labels)
    rows = max(1, STRIP // labels.shape[1])
    strips = (labels[top : top + rows].ravel() for top in range(0, len(labels), rows))
    return sum(np.bincount(strip, minlength=count) for strip in strips)


def legend(entries: Iterable[tuple[str, Sequence[int]]], width: int, size: int = 15) -> Image.Image:
    """Swatches with names, as many to a line as fit `width` pixels."""
    font, pad = ImageFont.load_default(size), size // 2
    placed, x, y = [], pad, pad
    for name, colour in entries:
        length = int(size * 1.4 + font.getlength(name) + pad * 2)
        if x > pad and x + length > width:
            x, y = pad, y + int(size * 1.6)
        placed.append((x, y, name, tuple(int(c) for c in colour)))
        x += length
    picture = Image.new("RGB", (width, y + int(size * 1.6)), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, name, colour in placed:
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline=INK)
        draw.text((x + int(size * 1.4), y + size // 2), name, font=font, fill=INK, anchor="lm")
    return picture


def overlay(photo: Image.Image, labels: Any, names: Sequence[str], palette: np.ndarray) -> Image.Image:
    """`photo` under the colours of `labels` (label t is ``names[t]``), over a legend of the classes that occur."""
    present = [(names[t], palette[t]) for t in np.flatnonzero(label_counts(labels, len(names)))]
    width = max(photo.width, 160)
    strip = legend(present, width, size=max(13, photo.width // 45))
    out = Image.new("RGB", (width, photo.height + strip.height), PAPER)
    blend(photo, labels, palette, onto=out)
    out.paste(strip, (0, photo.height))
    return out


def segmentation_figure(rows: Sequence[Row], path: str | Path, classes: Sequence[str]) -> None:
    """A PNG at `path`: per row the image, its truth, the prediction, the segments; below, the classes that occur."""
    palette, segments = class_palette(classes[0] == "background"), segment_palette()
    cells = [
        [
            row.image,
            colourise(row.truth, palette),
            colourise(row.prediction, palette),
            blend(row.image.convert("L").convert("RGB"), row.segments, segments, 0.6),
        ]
        for row in rows
    ]
    seen: set[int] = set()
    for row in rows:
        seen |= set(np.unique(row.truth).tolist()) | set(np.unique(row.prediction).tolist())
    entries = [("not scored" if t == IGNORE else classes[t], palette[t]) for t in sorted(seen)]
    save_grid(["image", "truth", "prediction", "segments"], cells, path, entries)


def mixing_figure(
    original: Tensor,
    mixed: Tensor,
    restored: Tensor,
    path: str | Path,
    mean: Sequence[float] = IMAGENET["mean"],
    std: Sequence[float] = IMAGENET["std"],
) -> None:
    """A PNG at `path`: per row an image, the mixed image at its place in the group, the restored image.

    Args:
        original, mixed, restored: ``[B, 3, H, W]``, normalised by `mean` and `std`.
    """
    columns = [to_pixels(images, mean, std) for images in (original, mixed, restored)]
    cells = [[Image.fromarray(pixels) for pixels in row] for row in zip(*columns, strict=True)]
    save_grid(["original", "mixed", "restored"], cells, path)


@torch.no_grad()
def segments_figure(
    images: Tensor,
    assignment: Tensor,
    path: str | Path,
    mean: Sequence[float] = IMAGENET["mean"],
    std: Sequence[float] = IMAGENET["std"],
) -> None:
    """A PNG at `path`: per row an image and its segments.

    Args:
        images: ``[B, 3, H, W]``, normalised by `mean` and `std`. assignment: soft map of patches ``[B, G, h, w]``.
    """
    maps = F.interpolate(assignment.float(), images.shape[2:], mode="bilinear")
    photos = map(Image.fromarray, to_pixels(images, mean, std))
    cells = [
        [photo, blend(photo.convert("L").convert("RGB"), labels, segment_palette(), 0.6)]
        for photo, labels in zip(photos, maps.argmax(dim=1).cpu().numpy(), strict=True)
    ]
    save_grid(["image", "segments"], cells, path)


def dataset_figure(segmenter: Any, dataset: Any, path: str | Path, count: int = 6) -> None:
    """:func:`segmentation_figure` of `count` photos spread over `dataset`, seen by a
    :class:`~mixreorg_fast.evaluation.zero_shot.Segmenter`."""
    count = min(count, len(dataset))
    rows = []
    for number in range(count):
        sample = dataset[number * len(dataset) // count]
        decoded = segmenter.segment(sample.image)
        rows.append(Row(sample.image, sample.mask, decoded.labels.cpu().numpy(), decoded.segments.cpu().numpy()))
    segmentation_figure(rows, path, dataset.classes)


def save_grid(
    titles: Sequence[str],
    cells: Sequence[Sequence[Image.Image]],
    path: str | Path,
    entries: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """A PNG at `path`: columns under `titles`, rows of pictures, and a legend of `entries` (name, colour)."""
    fitted = [[_fit(cell) for cell in row] for row in cells]
    heights = [max(cell.height for cell in row) for row in fitted]
    font = ImageFont.load_default(17)
    wrapped = [_wrapped(title, font) for title in titles]
    width, top = len(titles) * (CELL + GAP) + GAP, 14 + 20 * max(len(lines) for lines in wrapped)
    key = legend(entries, width) if entries else Image.new("RGB", (width, 0))
    picture = Image.new("RGB", (width, top + sum(height + GAP for height in heights) + key.height), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(wrapped):
        place = (GAP + column * (CELL + GAP) + CELL // 2, top // 2)
        draw.multiline_text(place, "\n".join(lines), font=font, fill=INK, anchor="mm", align="center")
    y = top
    for row, height in zip(fitted, heights, strict=True):
        for column, cell in enumerate(row):
            x = GAP + column * (CELL + GAP) + (CELL - cell.width) // 2
            picture.paste(cell, (x, y + (height - cell.height) // 2))
        y += height + GAP
    picture.paste(key, (0, y))
    save_png(path, picture)


def _wrapped(title: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """`title` in lines that fit over a column."""
    lines: list[str] = []
    for word in title.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= CELL:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]


def _fit(cell: Image.Image) -> Image.Image:
    """Into a square of `CELL` pixels; enlarged by whole pixels, so that labels and small images stay sharp."""
    scale = CELL / max(cell.size)
    size = (max(1, round(cell.width * scale)), max(1, round(cell.height * scale)))
    return cell.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
