"""Scores from exact integer counts, over any number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import json_or_empty, write_json
from ..inference.windows import Decoded, Labelled
from ..ranks import sum_over_ranks

IGNORE, IGNORE_16 = 255, 65535  # pixels that are not scored, in masks of 8 bits and of 16
BOUNDARY = 0.02  # of the photo's diagonal: how far a boundary region reaches into an object
RARE, FREQUENT = 10, 30  # photos that show a class; IoU of rare classes is mostly noise


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixel counts by (true class, predicted class): int64 ``[classes, classes]`` on the CPU.

    `truth` and `prediction`: integers of one shape, the latter 0..classes-1. Pixels whose truth is no class (`IGNORE`)
    do not count.
    """
    return overlaps(truth, prediction, classes, classes).T


def overlaps(truth: Tensor, segments: Tensor, classes: int, count: int) -> Tensor:
    """Pixel counts by (segment, true class): int64 ``[count, classes]`` on the CPU, `IGNORE` left out."""
    known = truth < classes
    index = segments[known].long() * classes + truth[known].long()
    return torch.bincount(index, minlength=count * classes).view(count, classes).cpu()


def oracle_matrix(overlap: Tensor) -> Tensor:
    """The confusion matrix of one image if each segment took its commonest true class (``[S, C]`` → ``[C, C]``)."""
    matrix = torch.zeros(overlap.shape[1], overlap.shape[1], dtype=torch.int64)
    return matrix.index_add_(0, overlap.argmax(dim=1), overlap).T


def one_class_matrix(matrix: Tensor, label: int = 0) -> Tensor:
    """The confusion matrix, over the same truth, of predicting class `label` everywhere; 0 may be the background."""
    everywhere = torch.zeros_like(matrix)
    everywhere[:, label] = matrix.sum(dim=1)
    return everywhere


def boundary_counts(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixel counts for Boundary IoU (Cheng et al., CVPR 2021) of one photo, from integer maps ``[H, W]``.

    The boundary region of a mask holds its pixels within d = `BOUNDARY` · diagonal (rounded, at least 1) of its
    contour, by the chessboard distance; the photo's edge is part of the contour. Pixels whose truth is no class belong
    to no mask of either map, so a prediction that equals the truth elsewhere scores 100.

    Returns:
        int64 ``[3, classes]`` on the CPU: pixels per class in the boundary regions of both maps, of the truth, and of
        the prediction. Boundary IoU is ``both / (truth + prediction - both)``, of the sums over the photos.
    """
    distance = max(1, round(BOUNDARY * math.hypot(*truth.shape)))
    known = truth < classes
    maps = torch.stack([truth.int(), prediction.int()]).where(known, -1)
    padded = F.pad(maps, [distance] * 4, value=-2)
    inner = _windows(padded, 2 * distance + 1, torch.maximum) == _windows(padded, 2 * distance + 1, torch.minimum)
    true, predicted = (~inner & known).unbind()
    both = true & predicted & (maps[0] == maps[1])
    regions = (maps[0][both], maps[0][true], maps[1][predicted])
    return torch.stack([torch.bincount(region, minlength=classes) for region in regions]).cpu()


def _windows(maps: Tensor, side: int, best: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maximum or minimum (`best`) of every `side` x `side` window of `maps`, in logarithmically many steps."""
    for dimension in (-2, -1):
        covered = 1
        while covered < side:
            step = min(covered, side - covered)
            length = maps.shape[dimension] - step
            maps = best(maps.narrow(dimension, 0, length), maps.narrow(dimension, step, length))
            covered += step
    return maps


def per_class_iou(matrix: Tensor) -> Tensor:
    """``true positives / (truth + prediction - true positives)`` in percent, fp64 ``[C]``.

    NaN for a class in neither the truth nor the prediction; means leave it out.
    """
    hit, truth, prediction = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    return 100 * hit.double() / (truth + prediction - hit)


def mean_iou(matrix: Tensor) -> float:
    """Mean of :func:`per_class_iou` over the classes that occur in the truth or the prediction, in percent."""
    return per_class_iou(matrix).nanmean().item()


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of the scored pixels with the right label, in percent."""
    return (100 * matrix.diagonal().sum().double() / matrix.sum()).item()


def mean_accuracy(matrix: Tensor) -> float:
    """Mean, over the classes of the truth, of the share of a class's pixels with the right label, in percent."""
    return (100 * matrix.diagonal().double() / matrix.sum(dim=1)).nanmean().item()


def mean_boundary_iou(counts: Tensor) -> float:
    """Mean Boundary IoU in percent of summed :func:`boundary_counts`, over the classes that occur in either map."""
    both, truth, prediction = counts
    return (100 * both.double() / (truth + prediction - both)).nanmean().item()


def frequent_mean_iou(matrix: Tensor, photos: Tensor) -> float | None:
    """Mean of :func:`per_class_iou` over the classes that at least `FREQUENT` of the `photos` ``[C]`` show, in percent.

    None if fewer than two classes are that frequent, or if every class is shown by at least `RARE` photos.
    """
    frequent = photos >= FREQUENT
    if frequent.sum() < 2 or photos.min() >= RARE:
        return None
    return per_class_iou(matrix)[frequent].mean().item()


class Tally:
    """The counts of an evaluation: integers only, so that sums over photos, ranks and interruptions are exact.

    Args:
        classes: how many there are. thresholds: how many other background thresholds are tried.
    Attributes:
        matrix, oracle, whole: int64 ``[C, C]`` confusion matrices of the labels, with every segment's best class, and
            with the whole photo's best name everywhere.
        sweep: int64 ``[thresholds, C, C]``, the confusion matrices at the other thresholds.
        boundary: int64 ``[3, C]``, the sum of :func:`boundary_counts`.
        photos: int64 ``[C]``, how many photos show each class.
        used: int64 ``[3]``, distinct segments, windows, photos.
        done: indices of the photos counted.
    """

    def __init__(self, classes: int, thresholds: int = 0) -> None:
        square = (classes, classes)
        shapes = [square, square, square, (thresholds, *square), (3, classes), (classes,), (3,)]
        self._counts = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.int64)
        parts = self._counts.split([math.prod(shape) for shape in shapes])
        self.matrix, self.oracle, self.whole, self.sweep, self.boundary, self.photos, self.used = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )
        self.done: set[int] = set()

    def add(self, index: int, truth: Tensor, found: Decoded | Labelled) -> None:
        """Count photo `index`, whose mask is `truth`, integer ``[H, W]``."""
        classes = len(self.matrix)
        matrix = confusion_matrix(truth, found.labels, classes)
        self.matrix += matrix
        self.boundary += boundary_counts(truth, found.labels, classes)
        self.photos += matrix.any(dim=1)
        used = 0
        if found.segments is not None:
            self.oracle += oracle_matrix(overlaps(truth, found.segments, classes, found.count))
            used = len(found.segments.unique())
        if found.whole is not None:
            self.whole += one_class_matrix(matrix, found.whole)
        self.used += torch.tensor([used, found.windows, 1])
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
        total = Tally(len(self.matrix), len(self.sweep))
        total._counts.copy_(sum_over_ranks(self._counts.to(device, copy=True)))
        return total

    def keep(self, path: Path, about: dict[str, Any]) -> None:
        """Write the counts to `path`, with a description of the evaluation (JSON values)."""
        write_json(path, {"about": about, "done": sorted(self.done), "counts": self._counts.tolist()})

    def restore(self, path: Path, about: dict[str, Any]) -> None:
        """Continue from the counts at `path`, if `about` describes them."""
        state = json_or_empty(path)
        if state.get("about") == json.loads(json.dumps(about)) and len(state.get("counts", ())) == len(self._counts):
            self._counts.copy_(torch.tensor(state["counts"]))
            self.done = set(state["done"])
