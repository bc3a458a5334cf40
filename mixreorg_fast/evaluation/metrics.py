"""Intersection over union from exact integer counts, over any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = 255


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


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_ranks(counts: Tensor, device: torch.device) -> Tensor:
    """The exact sum of an int64 tensor over all ranks, on the CPU; `device` is the model's (NCCL sums only there)."""
    if rank_and_world()[1] == 1:
        return counts
    counts = counts.to(device)
    torch.distributed.all_reduce(counts)
    return counts.cpu()
