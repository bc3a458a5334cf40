"""From segments to pixel labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose


def decode_segments_reference(
    assignment: Tensor, scores: Tensor, size: tuple[int, int], background_threshold: Tensor | float | None = None
) -> Tensor:
    """Labels by the definition: upsample, arg-max over groups, look the segment's best class up."""
    maps = F.interpolate(assignment.float(), size=size, mode="bilinear", align_corners=False)
    segment = maps.argmax(dim=1)  # [B, H, W]
    best, label = scores.float().max(dim=2)  # [B, G]
    if background_threshold is not None:
        threshold = torch.as_tensor(background_threshold, dtype=best.dtype, device=best.device).reshape(-1, 1)
        label = torch.where(best < threshold, 0, label + 1)
    return label.gather(1, segment.flatten(1)).view_as(segment)


def decode_segments(
    assignment: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    background_threshold: Tensor | float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Label every pixel with the best class of its segment.

    The class depends on the pixel only through its segment: an arg-max over G upsampled maps and a look-up, never an
    ``[H, W, T]`` tensor.

    Args:
        assignment: ``[B, G, h, w]``, upsampled bilinearly (align_corners=False) to `size` = (H, W).
        scores: ``[B, G, T]``, class scores of each segment.
        background_threshold: float or ``[B]``. With it, label 0 is background (the segment's best score is below it)
            and class t is t + 1; without it, class t is t.
    Returns:
        int64 ``[B, H, W]``. Not differentiable. Ties take the lowest segment and class.
    Raises:
        ValueError: shapes that do not fit together.
    """
    if assignment.dim() != 4 or scores.dim() != 3 or assignment.shape[:2] != scores.shape[:2]:
        raise ValueError(
            f"decode_segments: expected assignment [B, G, h, w] and scores [B, G, T], got {list(assignment.shape)} "
            f"and {list(scores.shape)}"
        )
    choose("decode_segments", impl, {"torch": list})
    return decode_segments_reference(assignment, scores, tuple(size), background_threshold)
