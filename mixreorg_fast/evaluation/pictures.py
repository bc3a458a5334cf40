"""Figures for people: segmentations beside their truth, mixed and restored images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..images import to_pixels
from ..inference.fonts import draw_text, length, wrap
from ..inference.overlay import INK, PAPER, class_palette, colourise, legend, save_picture, segments_picture

CELL, GAP, TITLE = 224, 8, 17


def segmentation_figure(
    rows: Sequence[tuple[Image.Image, Any, Any, Any]], path: str | Path, classes: Sequence[str]
) -> None:
    """A PNG at `path`: per row the image, its truth, the prediction, the segments; below, the classes that occur.

    Maps are integer arrays ``[H, W]``. Where one row has None for segments, every row has.
    """
    palette = class_palette(classes[0] == "background")
    titles, cells = ["image", "truth", "prediction"], []
    for image, truth, prediction, segments in rows:
        cells.append([image, colourise(truth, palette), colourise(prediction, palette)])
        if segments is not None:
            titles[3:] = ["segments"]
            cells[-1].append(segments_picture(image, segments))
    occurring = [np.unique(labels) for _, *both, _ in rows for labels in both]
    seen: list[int] = np.unique(np.concatenate(occurring)).tolist()
    names = dict(enumerate(classes))
    save_grid(titles, cells, path, [(names.get(t, "not scored"), palette[t % len(palette)]) for t in seen])


def mixing_figure(
    original: Tensor, mixed: Tensor, restored: Tensor, path: str | Path, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A PNG at `path`: per row an image, the mixed image at its place in the group, the restored image; all three are
    ``[B, 3, H, W]``, normalised by `mean` and `std`."""
    columns = [to_pixels(images, mean, std) for images in (original, mixed, restored)]
    cells = [[Image.fromarray(pixels) for pixels in row] for row in zip(*columns, strict=True)]
    save_grid(["original", "mixed", "restored"], cells, path)


@torch.no_grad()
def segments_figure(
    images: Tensor, assignment: Tensor, path: str | Path, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A PNG at `path`: per row one of `images` ``[B, 3, H, W]``, normalised by `mean` and `std`, and its segments.
    `assignment`: soft map of patches ``[B, G, h, w]``."""
    segments = F.interpolate(assignment.float(), images.shape[2:], mode="bilinear").argmax(dim=1).cpu().numpy()
    photos = map(Image.fromarray, to_pixels(images, mean, std))
    cells = [[photo, segments_picture(photo, own)] for photo, own in zip(photos, segments, strict=True)]
    save_grid(["image", "segments"], cells, path)


def dataset_figure(segmenter: Any, dataset: Any, path: str | Path, count: int = 6) -> None:
    """:func:`segmentation_figure` of `count` photos spread over `dataset`, seen by a
    :class:`~mixreorg_fast.inference.segmenter.Segmenter` or another model."""
    rows = []
    for sample in map(dataset.__getitem__, dataset.spread(count)):
        decoded = segmenter.segment(sample.image)
        segments = None if decoded.segments is None else decoded.segments.cpu().numpy()
        rows.append((sample.image, sample.mask, decoded.labels.cpu().numpy(), segments))
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
    wrapped = [wrap(title, TITLE, CELL) for title in titles]
    width, top = len(titles) * (CELL + GAP) + GAP, 14 + 20 * max(len(lines) for lines in wrapped)
    key = legend(entries, width) if entries else Image.new("RGB", (width, 0))
    picture = Image.new("RGB", (width, top + sum(height + GAP for height in heights) + key.height), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(wrapped):
        middle = GAP + column * (CELL + GAP) + CELL // 2
        for number, line in enumerate(lines):
            y = top // 2 + 20 * number - 10 * len(lines) + 16
            draw_text(draw, (middle - length(line, TITLE) / 2, y), line, TITLE, INK)
    y = top
    for row, height in zip(fitted, heights, strict=True):
        for column, cell in enumerate(row):
            x = GAP + column * (CELL + GAP) + (CELL - cell.width) // 2
            picture.paste(cell, (x, y + (height - cell.height) // 2))
        y += height + GAP
    picture.paste(key, (0, y))
    save_picture(path, picture)


def _fit(cell: Image.Image) -> Image.Image:
    """Fit into a square of `CELL` pixels; enlarged by nearest neighbour, so that labels and small images stay sharp."""
    scale = CELL / max(cell.size)
    size = (max(1, round(cell.width * scale)), max(1, round(cell.height * scale)))
    return cell.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
