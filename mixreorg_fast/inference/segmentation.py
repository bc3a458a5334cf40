"""The result for one photo: labels, areas, scores, pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .overlay import class_palette, kind_of, label_counts, overlay, save_labels, save_picture


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A photo, segmented.

    Attributes:
        labels: integers ``[H, W]``: label t is ``classes[t]``. int64 from ``model.segment``, else uint8 or int32.
        classes: names of the labels; with a background it is the first.
        segments: integers ``[H, W]`` in the same dtype: the final segment of each pixel.
        stages: fp32 ``[G, h, w]`` per grouping stage: probability of its segments per patch.
        scores: per class its best score (0..1) among the segments in the picture; the background has none.
        photo: RGB.
    """

    labels: Tensor
    classes: list[str]
    segments: Tensor
    stages: tuple[Tensor, ...]
    scores: dict[str, float]
    photo: Image.Image

    @property
    def has_background(self) -> bool:
        return len(self.scores) < len(self.classes)

    @property
    def areas(self) -> dict[str, float]:
        """Share of the photo that each class takes; they add up to 1."""
        shares = label_counts(self.labels.cpu(), len(self.classes)) / self.labels.numel()
        return dict(zip(self.classes, shares.tolist(), strict=True))

    def overlay(self) -> Image.Image:
        """The photo under its classes' colours, over a legend of the classes that occur."""
        return overlay(self.photo, self.labels.cpu(), self.classes, class_palette(self.has_background))

    def save(self, path: str | Path) -> None:
        """Write the overlay, in the format that the suffix names.

        Raises:
            UserError: an unknown suffix, or a place that cannot be written.
        """
        kind = kind_of(path)  # before the work
        save_picture(path, self.overlay(), kind)

    def save_mask(self, path: str | Path) -> None:
        """Write a palette PNG whose values are the labels, in Pascal VOC's colours.

        Raises:
            UserError: more than 255 labels, or a place that cannot be written.
        """
        if len(self.classes) > 255:
            raise UserError(f"{path}: a mask holds at most 255 labels, got {len(self.classes)}")
        save_labels(path, self.labels.to(torch.uint8), self.has_background)

    def long(self) -> Segmentation:
        """The same with labels and segments in int64, by which tensors can be indexed."""
        return replace(self, labels=self.labels.long(), segments=self.segments.long())
