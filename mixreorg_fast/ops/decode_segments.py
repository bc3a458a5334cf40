"""Pixel labels from the soft maps and class scores of segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, falls_back, uses_triton
from .registration import kernel


def decode_segments_reference(
    assignment: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    threshold: Tensor | None = None,
    *,
    upcast: torch.dtype = torch.float32,
) -> Tensor:
    """Labels by the definition: upsample, arg-max over groups, look the segment's best class up."""
    maps = F.interpolate(assignment.to(upcast), size=size, mode="bilinear", align_corners=False)
    segment = maps.max(dim=1).indices  # [B, H, W]; on a CPU argmax takes 15 times as long
    best, label = scores.to(upcast).max(dim=2)  # [B, G]
    if threshold is not None:
        label = torch.where(best < threshold[:, None], 0, label + 1)
    return label.gather(1, segment.flatten(1)).view_as(segment)


@falls_back
def decode_segments(
    assignment: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    background_threshold: Tensor | float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Label every pixel with the best class of its segment.

    Equivalent to ``interpolate(assignment, size, mode="bilinear").argmax(1)`` looked up in ``scores.argmax(2)``: never
    an ``[H, W, T]`` tensor.

    Args:
        assignment: ``[B, G, h, w]``, upsampled bilinearly (align_corners=False) to `size` = (H, W) in fp32.
        scores: ``[B, G, T]``, class scores of each segment. Both fp32, bf16 or fp16, finite, any strides.
        background_threshold: float or ``[B]``. With it, label 0 is background (the segment's best score is below it)
            and class t is t + 1; without it, class t is t.
    Returns:
        int64 ``[B, H, W]``. Deterministic, not differentiable. Ties take the lowest segment and class.
    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `impl` cannot run here.
    """
    height, width = size
    fit = assignment.dim() == 4 and scores.dim() == 3 and assignment.shape[:2] == scores.shape[:2]
    if not fit or 0 in (*assignment.shape[1:], scores.shape[2]):
        raise ValueError(
            f"decode_segments: expected assignment [B, G, h, w] and scores [B, G, T], none of them empty, got "
            f"{list(assignment.shape)} and {list(scores.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"decode_segments: size must be two positive numbers, got {tuple(size)}")
    assignment, scores = assignment.detach(), scores.detach()
    threshold = _threshold(background_threshold, assignment)
    if uses_triton("decode_segments", impl, assignment, scores):
        return _decode_segments(assignment, scores, threshold, height, width)
    return decode_segments_reference(assignment, scores, (height, width), threshold)


def _threshold(threshold: Tensor | float | None, assignment: Tensor) -> Tensor | None:
    """One fp32 number per image."""
    batch = assignment.shape[0]
    if threshold is None:
        return None
    if not isinstance(threshold, Tensor):
        return torch.full((batch,), threshold, dtype=torch.float32, device=assignment.device)
    if threshold.shape not in ((), (1,), (batch,)):
        shape = list(threshold.shape)
        raise ValueError(f"decode_segments: background_threshold must be a number or [{batch}], got {shape}")
    return threshold.to(assignment.device, torch.float32).expand(batch)


@kernel("decode_segments.decode_forward")
def _decode_segments(assignment: Tensor, scores: Tensor, threshold: Tensor | None, height: int, width: int) -> Tensor:
    return assignment.new_empty((assignment.shape[0], height, width), dtype=torch.int64)
