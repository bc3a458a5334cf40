"""Labels as pictures: colours, photos under them, legends, masks."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from ..errors import UserError
from ..files import atomic_path, saving
from ..palette import voc_palette
from .fonts import draw_text, length, wrap

INK, PAPER, UNKNOWN = (30, 30, 30), (255, 255, 255), (224, 224, 192)  # the last is VOC's colour for ignored pixels
IGNORED = 255  # the label of pixels that are not scored
STRIP = 1 << 22  # pixels blended at once
LEGEND = 320  # pixels: a legend below a narrower picture widens up to this for its names

# Colours far apart in CIELAB, both pure and blended over black and over white; L* of each is at least 45.
_DISTINCT = """ff1100 00ff00 0088ff ff00bb bbeebb ffcc00 ffccff 886600 00ffaa 118888 bb4477 bb00ff 4455ff ff0055 11ffff
bbff00 338833 dd77ff bb4422 ffbb99 666699 ff8800 00bb22 88aa00"""


def class_palette(has_background: bool) -> np.ndarray:
    """Colours by label for pictures, uint8 ``[256, 3]``; the background is black. The first 24 classes are distinct."""
    distinct = np.array([list(bytes.fromhex(colour)) for colour in _DISTINCT.split()], dtype=np.uint8)
    black = np.zeros((int(has_background), 3), np.uint8)
    palette = np.concatenate([black, distinct, segment_palette()])[:256]
    palette[IGNORED] = UNKNOWN
    return palette


def mask_palette(has_background: bool) -> np.ndarray:
    """Colours by label for masks, Pascal VOC's, uint8 ``[256, 3]``. Without a background the first class takes VOC's
    second colour, since the first is black."""
    palette = voc_palette() if has_background else np.roll(voc_palette(), -1, axis=0)
    palette[IGNORED] = UNKNOWN
    return palette


def segment_palette() -> np.ndarray:
    """Colours by segment number, neighbours far apart in hue; uint8 ``[256, 3]``."""
    golden = 0.618034
    hues = [colorsys.hsv_to_rgb(i * golden % 1, 0.65 if i % 2 else 0.9, 0.95 if i % 3 else 0.75) for i in range(256)]
    return (np.array(hues) * 255).astype(np.uint8)


def colourise(labels: Any, palette: np.ndarray) -> Image.Image:
    """Labels ``[H, W]`` as an RGB picture; numbers past 255 begin again."""
    return Image.fromarray(palette[np.asarray(labels).astype(np.uint8)])


def blend(
    photo: Image.Image, labels: Any, palette: np.ndarray, opacity: float = 0.55, onto: Image.Image | None = None
) -> Image.Image:
    """`photo` under the colours of `labels`; black (the background) leaves the photo unchanged.

    Drawn at the top left of `onto`, or of a new picture, in strips, so that a photo of a hundred megapixels needs
    little memory beside the result.
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


def segments_picture(photo: Image.Image, segments: Any) -> Image.Image:
    """`photo` in grey under the colours of its `segments` ``[H, W]``."""
    return blend(photo.convert("L").convert("RGB"), segments, segment_palette(), 0.6)


def label_counts(labels: Any, count: int) -> np.ndarray:
    """Pixels of each label 0..count-1, int64 ``[count]``; in strips, since NumPy converts what it counts to int64."""
    labels = np.asarray(labels)
    rows = max(1, STRIP // labels.shape[1])
    strips = (labels[top : top + rows].ravel() for top in range(0, len(labels), rows))
    return np.sum([np.bincount(strip, minlength=count) for strip in strips], axis=0)


def legend(entries: Iterable[tuple[str, Sequence[int]]], width: int, size: int = 15) -> Image.Image:
    """Swatches with names, as many to a line as fit `width` pixels; a name that is longer takes several lines."""
    pad, text, line = size // 2, int(size * 1.4), int(size * 1.6)  # `text`: from a swatch's left to its name's
    placed, x, y, height = [], pad, pad, line
    for name, colour in entries:
        lines = wrap(name, size, width - pad - text - pad)
        wide = int(text + max(length(part, size) for part in lines) + pad * 2)
        if x > pad and x + wide > width + pad:
            x, y, height = pad, y + height, line
        placed.append((x, y, lines, tuple(int(c) for c in colour)))
        x, height = x + wide, max(height, line * len(lines))
    picture = Image.new("RGB", (width, y + height), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, lines, colour in placed:
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline=INK)
        for number, part in enumerate(lines):
            draw_text(draw, (x + text, y + number * line + int(size * 0.85)), part, size, INK)
    return picture


def overlay(photo: Image.Image, labels: Any, names: Sequence[str], palette: np.ndarray) -> Image.Image:
    """`photo` under the colours of `labels` (label t is ``names[t]``), over a legend of the classes that occur."""
    occurring: list[int] = np.flatnonzero(label_counts(labels, len(names))).tolist()
    present: list[tuple[str, list[int]]] = [(names[t], palette[t % len(palette)].tolist()) for t in occurring]
    size = max(13, photo.width // 45)
    longest = max(length(name, size) for name, _ in present) + 3 * size
    width = max(photo.width, 160, min(int(longest), LEGEND))
    strip = legend(present, width, size)
    out = Image.new("RGB", (width, photo.height + strip.height), PAPER)
    blend(photo, labels, palette, onto=out)
    out.paste(strip, (0, photo.height))
    return out


def save_picture(
    path: str | Path, picture: Image.Image, kind: str = "PNG", about: dict[str, str] | None = None
) -> None:
    """Write `picture` at `path`, whole or not at all; folders are made. Raises a UserError where it cannot.

    `kind`: a format as Pillow names it. `about`: notes, for a PNG's text chunks.
    """
    notes = PngImagePlugin.PngInfo()
    for key, value in (about or {}).items():
        notes.add_text(key, value)
    with saving(path), atomic_path(path) as temporary:
        picture.save(temporary, format=kind, quality=95, pnginfo=notes)


def kind_of(path: str | Path) -> str:
    """The picture format that the suffix of `path` names. Raises a UserError if Pillow cannot write it."""
    suffix = Path(path).suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise UserError(f"{path}: no picture can be written with the suffix '{suffix}'; .png and .jpg are common")
    return kind


def save_labels(path: str | Path, labels: Tensor, has_background: bool, about: dict[str, str] | None = None) -> None:
    """Labels ``[H, W]`` as a PNG of these values: uint8 with :func:`mask_palette`'s colours, others as 16-bit grey."""
    values = labels.cpu().numpy()
    picture = Image.fromarray(values if values.dtype == np.uint8 else values.astype(np.uint16))
    if picture.mode == "L":
        picture.putpalette(mask_palette(has_background).tobytes())
    save_picture(path, picture, about=about)
