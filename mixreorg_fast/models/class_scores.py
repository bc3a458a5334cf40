"""Class scores of an image's final segments (GroupViT, CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 5  # classes that an image may show


def class_scores(embeddings: Tensor, image: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Scores of every class for every segment.

    ``softmax(s·cos over the image's best classes) · softmax(s·cos over all classes)``, where the image's best classes
    are the `TOP` ones whose text is most similar to the whole image; every other class scores exactly 0.

    Args:
        embeddings: ``[B, G, D]`` L2-normalised segment embeddings.
        image: ``[B, D]`` L2-normalised image embeddings.
        texts: ``[T, D]`` L2-normalised class embeddings.
        logit_scale: the multiplier s.
    Returns:
        fp32 ``[B, G, T]`` in 0..1.
    """
    embeddings, image, texts = embeddings.float(), image.float(), texts.float()
    logits = embeddings @ texts.T * logit_scale  # [B, G, T]
    best = (image @ texts.T).topk(min(TOP, len(texts)), dim=-1).indices  # [B, TOP]
    absent = torch.ones(len(image), len(texts), dtype=torch.bool, device=logits.device).scatter(1, best, False)
    restricted = logits.masked_fill(absent[:, None], float("-inf")).softmax(dim=-1)
    return restricted * logits.softmax(dim=-1)


def image_threshold(scores: Tensor, threshold: float) -> Tensor:
    """``min(threshold, the image's best score)``: ``[B]`` from scores ``[B, G, T]``.

    With this threshold the segment of the best score is never background.
    """
    return scores.flatten(1).amax(dim=1).clamp(max=threshold)
