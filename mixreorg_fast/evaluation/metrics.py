"""Intersection over union from exact integer counts, over any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json
from ..ranks import sum_over_ranks

IGNORE = 255
RARE, FREQUENT = 10, 30  # photos that show a class; IoU of rare classes is mostly noise


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixel counts by (true class, predicted class); pixels whose truth is `IGNORE` do not count.

    Args:
        truth: integer, any shape, 0..classes-1 or `IGNORE`.
        prediction: integer, the same shape, 0..classes-1.
    Returns:
        int64 ``[classes, classes]`` on the CPU.
    """
    return overlaps(truth, prediction, classes, classes).T


def overlaps(truth: Tensor, segments: Tensor, classes: int, count: int) -> Tensor:
    """Pixel counts by (segment, true class): int64 ``[count, classes]`` on the CPU, `IGNORE` left out."""
    known = truth != IGNORE
    index = segments[known].long() * classes + truth[known].long()
    return torch.bincount(index, minlength=count * classes).view(count, classes).cpu()


def oracle_matrix(overlap: Tensor) -> Tensor:
    """The confusion matrix of one image if each segment took its commonest true class (``[S, C]`` → ``[C, C]``)."""
    matrix = torch.zeros(overlap.shape[1], overlap.shape[1], dtype=torch.int64)
    return matrix.index_add_(0, overlap.argmax(dim=1), overlap).T


def all_background_matrix(matrix: Tensor) -> Tensor:
    """The confusion matrix, over the same truth, of predicting class 0 everywhere."""
    background = torch.zeros_like(matrix)
    background[:, 0] = matrix.sum(dim=1)
    return background


def per_class_iou(matrix: Tensor) -> Tensor:
    """``true positives / (truth + prediction - true positives)`` in percent, fp64 ``[C]``.

    NaN for a class that occurs neither in the truth nor in the prediction: it says nothing and counts nowhere.
    """
    matrix = matrix.double()
    hit = matrix.diagonal()
    return 100 * hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)


def mean_iou(matrix: Tensor) -> float:
    """Mean of :func:`per_class_iou` over the classes that occur in the truth or the prediction, in percent."""
    return per_class_iou(matrix).nanmean().item()


def frequent_mean_iou(matrix: Tensor, photos: Tensor) -> float | None:
    """Mean of :func:`per_class_iou` over the classes that at least `FREQUENT` of the `photos` ``[C]`` show, in percent.

    None where fewer than two classes are so frequent, or where none is rare, shown by fewer than `RARE`.
    """
    frequent = photos >= FREQUENT
    if frequent.sum() < 2 or photos.min() >= RARE:
        return None
    return per_class_iou(matrix)[frequent].mean().item()


class Tally:
    """The counts of an evaluation: integers only, so that sums over photos, ranks and interruptions are exact.

    Attributes:
        matrix, oracle: int64 ``[C, C]`` confusion matrices of the labels, and with every segment's best class.
        photos: int64 ``[C]``, how many photos show each class.
        used: int64 ``[3]``, distinct segments, windows, photos.
        done: indices of the photos counted.
    """

    def __init__(self, classes: int) -> None:
        sizes = [classes * classes, classes * classes, classes, 3]
        self._counts = torch.zeros(sum(sizes), dtype=torch.int64)
        matrix, oracle, self.photos, self.used = self._counts.split(sizes)
        self.matrix, self.oracle = (part.view(classes, classes) for part in (matrix, oracle))
        self.done: set[int] = set()

    def add(self, index: int, truth: Tensor, labels: Tensor, segments: Tensor, count: int, windows: int) -> None:
        """Count photo `index`, of `count` possible segments in `windows` windows; all maps integer ``[H, W]``."""
        classes = len(self.matrix)
        matrix = confusion_matrix(truth, labels, classes)
        self.matrix += matrix
        self.photos += matrix.any(dim=1)
        self.oracle += oracle_matrix(overlaps(truth, segments, classes, count))
        self.used += torch.tensor([len(segments.unique()), windows, 1])
        self.done.add(index)

    @property
    def images(self) -> int:
        return int(self.used[2])

    @property
    def groups_used(self) -> float:
        """Distinct segments per window, on average."""
        return (self.used[0] / self.used[1]).item()

    def over_ranks(self, device: torch.device) -> Tally:
        """The sum over all ranks; `device` is the model's (NCCL sums only there)."""
        total = Tally(len(self.matrix))
        total._counts.copy_(sum_over_ranks(self._counts.to(device, copy=True)))
        return total

    def keep(self, path: Path, about: dict[str, Any]) -> None:
        """Write the counts to `path`, with a description of the evaluation (JSON values)."""
        write_json(path, {"about": about, "done": sorted(self.done), "counts": self._counts.tolist()})

    def restore(self, path: Path, about: dict[str, Any]) -> None:
        """Go on from the counts at `path`, if there are any and `about` describes them."""
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if state["about"] == json.loads(json.dumps(about)) and len(state.get("counts", ())) == len(self._counts):
            self._counts.copy_(torch.tensor(state["counts"]))
            self.done = set(state["done"])
