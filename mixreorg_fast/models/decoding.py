"""Class scores of segments, and labels straight from them (GroupViT, CVPR 2022, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def class_scores(embeddings: Tensor, image: Tensor, texts: Tensor, logit_scale: Tensor | float, top: int = 5) -> Tensor:
    """Scores of every class for every segment.

    ``softmax(s·cos over the image's best classes) · softmax(s·cos over all classes)``, where the image's best classes
    are the `top` ones whose text is most similar to the whole image; every other class scores exactly 0.

    Args:
        embeddings: ``[B, G, D]`` L2-normalised segment embeddings.
        image: ``[B, D]`` L2-normalised image embeddings.
        texts: ``[T, D]`` L2-normalised class embeddings.
        logit_scale: the multiplier s.
        top: how many classes an image may show.
    Returns:
        fp32 ``[B, G, T]`` in 0..1.
    """
    embeddings, image, texts = embeddings.float(), image.float(), texts.float()
    logits = embeddings @ texts.T * logit_scale  # [B, G, T]
    best = (image @ texts.T).topk(min(top, len(texts)), dim=-1).indices  # [B, top]
    absent = torch.ones(len(image), len(texts), dtype=torch.bool, device=logits.device).scatter(1, best, False)
    restricted = logits.masked_fill(absent[:, None], float("-inf")).softmax(dim=-1)
    return restricted * logits.softmax(dim=-1)


def image_threshold(scores: Tensor, threshold: float) -> Tensor:
    """``min(threshold, the image's best score)``: ``[B]`` from scores ``[B, G, T]``.

    So the surest segment of an image is never background.
    """
    return scores.flatten(1).amax(dim=1).clamp(max=threshold)


def decode_direct(
    maps: Tensor,
    embeddings: Tensor,
    image: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    size: tuple[int, int],
    background_threshold: float | None = None,
) -> Tensor:
    """Labels at `size` straight from the maps: one arg-max over the segments per pixel.

    Args:
        maps: ``[B, G, h, w]``, the soft assignment of patches to final segments.
        embeddings, image, texts, logit_scale: as in :func:`class_scores`.
        size: (H, W) of the labels.
        background_threshold: a segment whose best score is below :func:`image_threshold` is background.
    Returns:
        int64 ``[B, H, W]``: class t as t; with a threshold, background as 0 and class t as t + 1.
    """
    scores = class_scores(embeddings, image, texts, logit_scale)
    threshold = None if background_threshold is None else image_threshold(scores, background_threshold)
    return ops.decode_segments(maps, scores, size, background_threshold=threshold)
