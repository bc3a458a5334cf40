"""The segmentation loss of mixed images (MixReorg, ICCV 2023, section 3; the formula is ours)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose
from .mixing import MixPlan


def mixed_segmentation_logits(
    first: Tensor,
    second: Tensor,
    segments: Tensor,
    texts: Tensor,
    group_size: int,
    logit_scale: Tensor | float,
    *,
    upcast: torch.dtype = torch.float32,
) -> Tensor:
    """Logits ``[B, N, K]`` of each patch over the K texts of its mixing group, in `upcast`.

    Re-associated as ``firstᵀ (secondᵀ (segments · textsᵀ))``: G1 x K numbers per image, never ``[B, N, G2]``.
    """
    first, second, segments, texts = (x.to(upcast) for x in (first, second, segments, texts))
    texts = texts.unflatten(0, (-1, group_size)).repeat_interleave(group_size, dim=0)  # [B, K, D]
    scores = segments @ texts.mT * logit_scale  # [B, G2, K]
    return first.mT @ (second.mT @ scores)  # [B, N, K] <- [B, N, G1] @ ([B, G1, G2] @ [B, G2, K])


def mixed_segmentation_loss(
    first: Tensor,
    second: Tensor,
    segments: Tensor,
    texts: Tensor,
    plan: MixPlan,
    logit_scale: Tensor | float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy of every mixed patch against the image it came from, over the texts of its mixing group.

    Args:
        first: ``[B, G1, N]``, assignment of patches to stage-1 segments. second: ``[B, G2, G1]``.
        segments: ``[B, G2, D]`` and texts: ``[B, D]``, L2-normalised by the caller.
        plan: the mixing of these B images. logit_scale: the multiplier of the cosines.
    Returns:
        0-d fp32, the mean over B·N patches.
    Raises:
        ValueError: shapes that do not fit together.
    """
    batch, groups, patches = first.shape
    fits = (
        second.dim() == 3
        and second.shape[0] == batch
        and second.shape[2] == groups
        and segments.shape[:2] == second.shape[:2]
        and texts.shape == (batch, segments.shape[2])
        and plan.source.shape == (batch, patches)
    )
    if not fits:
        raise ValueError(
            "mixed_segmentation_loss: expected first [B, G1, N], second [B, G2, G1], segments [B, G2, D], "
            f"texts [B, D] and a plan of [B, N], got {list(first.shape)}, {list(second.shape)}, "
            f"{list(segments.shape)}, {list(texts.shape)} and {list(plan.source.shape)}"
        )
    choose("mixed_segmentation_loss", impl, {"torch": list})
    logits = mixed_segmentation_logits(first, second, segments, texts, plan.group_size, logit_scale)
    return F.cross_entropy(logits.flatten(0, 1), plan.labels.flatten())
