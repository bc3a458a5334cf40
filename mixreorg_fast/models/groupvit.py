"""GroupViT (CVPR 2022): the backbone, and all that is left of MixReorg at test time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import ModelConfig
from ..images import IMAGENET_MEAN, IMAGENET_STD
from .image_encoder import ImageEncoder
from .layers import Projection
from .text_encoder import TextEncoder

TOP = 5  # classes that an image may show


@dataclass(frozen=True)
class Segments:
    """The final segments of images and where they lie."""

    maps: Tensor  # fp32 [B, G, h, w]: probability of each segment per patch, the product of both soft assignments
    embeddings: Tensor  # fp32 [B, G, D], L2-normalised
    image: Tensor  # fp32 [B, D], L2-normalised embedding of the pooled image
    stages: tuple[Tensor, ...] = ()  # such maps of every grouping stage, finest first; the last are `maps`


def class_scores(embeddings: Tensor, image: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Scores of every class for every segment.

    ``softmax(s·cos over the image's best classes) · softmax(s·cos over all classes)``, where the image's best classes
    are the `TOP` ones whose text is most similar to the whole image; every other class scores exactly 0.

    Args:
        embeddings: of segments, ``[B, G, D]``. image: ``[B, D]``. texts: of classes, ``[T, D]``. All L2-normalised.
        logit_scale: the multiplier s.
    Returns:
        fp32 ``[B, G, T]`` in 0..1.
    """
    embeddings, image, texts = embeddings.float(), image.float(), texts.float()
    logits = embeddings @ texts.T * logit_scale  # [B, G, T]
    cosines = F.pad(image @ texts.T, (0, TOP), value=float("-inf"))  # of fewer than TOP classes all are taken
    best = cosines.topk(TOP, dim=-1).indices
    absent = torch.ones_like(cosines, dtype=torch.bool).scatter(1, best, False)[:, :-TOP]
    restricted = logits.masked_fill(absent[:, None], float("-inf")).softmax(dim=-1)
    return restricted * logits.softmax(dim=-1)


def image_threshold(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """``min(threshold, the image's best score)``: ``[B]`` from scores ``[B, G, T]``.

    With this threshold the segment of the best score is never background.
    """
    return scores.flatten(1).amax(dim=1).clamp(max=threshold)


def label_pixels(
    seen: Segments, texts: Tensor, logit_scale: Tensor, size: tuple[int, int], background_threshold: float | None
) -> Tensor:
    """Labels as of :meth:`GroupViT.segment_labels`."""
    scores = class_scores(seen.embeddings, seen.image, texts, logit_scale)
    threshold = None if background_threshold is None else image_threshold(scores, background_threshold)
    return ops.decode_segments(seen.maps, scores, size, background_threshold=threshold)


class GroupViT(nn.Module):
    """Image and text encoders with their projections into one embedding.

    Args:
        config: sizes; `config.text.vocab_size` must be set.
        mean, std: per-channel normalisation of RGB in 0..1 that `images` have gone through.
    """

    def __init__(self, config: ModelConfig, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        if not config.text.vocab_size:
            raise ValueError("config.text.vocab_size is 0; set it to the tokenizer's size")
        self.config = config
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config.text)
        self.image_projection = Projection(config.width, config.projection_hidden, config.embed_dim)
        self.text_projection = Projection(config.text.width, config.projection_hidden, config.embed_dim)
        # The logarithm of the logit scale, [1]: DeepSpeed crashes on 0-d parameters. Files of all programs hold it 0-d.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the activations in evaluation: ``model.bfloat16()`` evaluates in bf16, with
        normalisation, softmax, maps, scores and all that is returned in fp32."""
        return self.image_projection.fc2.weight.dtype

    def logit_multiplier(self) -> Tensor:
        """The logit scale, 0-d fp32: the exponential of the parameter, at most 100."""
        return self.logit_scale.float().exp().clamp(max=100.0).squeeze(0)

    def forward(
        self, images: Tensor, ids: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images and of texts, ``[B, D]`` and ``[T, D]``, L2-normalised, and the logit scale, 0-d; fp32.

        The original branch alone, without noise: the evaluation network, differentiable. The arguments are those of
        :meth:`image_embeddings` and :meth:`text_embeddings`.
        """
        _, pooled, _ = self.image_encoder(images)
        texts = self.text_encoder(ids, self.dtype, lengths)
        return self.image_projection(pooled), self.text_projection(texts), self.logit_multiplier()

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """L2-normalised ``[B, D]`` of normalised RGB images ``[B, 3, H, W]``, H and W multiples of the patch size."""
        _, pooled, _ = self.image_encoder(images)
        return self.image_projection(pooled)

    @torch.no_grad()
    def text_embeddings(self, ids: Tensor, *, normalise: bool = True, lengths: Sequence[int] | None = None) -> Tensor:
        """``[B, D]`` of token ids int64 ``[B, L]``, pooled at the first occurrence of the highest id.

        L2-normalised unless `normalise` is False, for embeddings that are averaged first. `lengths`: tokens up to and
        including that id, host integers; without them the host waits for a GPU to find that id.
        """
        return self.text_projection(self.text_encoder(ids, self.dtype, lengths), normalise=normalise)

    @torch.no_grad()
    def grouping(self, images: Tensor) -> Tensor:
        """Soft map of patches to final segments, fp32 ``[B, G, h, w]`` (sums to 1 over G)."""
        return self.image_encoder(images)[2][-1]

    @torch.no_grad()
    def segments(self, images: Tensor) -> Segments:
        """Maps and embeddings of the final segments of images ``[B, 3, H, W]``."""
        tokens, pooled, maps = self.image_encoder(images)
        image = self.image_projection(pooled)
        embeddings = self.image_projection(tokens.flatten(0, 1))
        return Segments(maps[-1], embeddings.unflatten(0, tokens.shape[:2]), image, maps)

    @torch.no_grad()
    def segment_labels(
        self,
        images: Tensor,
        text_embeddings: Tensor,
        *,
        size: tuple[int, int] | None = None,
        background_threshold: float | None = None,
    ) -> Tensor:
        """Label every pixel with one of T classes.

        Args:
            images: ``[B, 3, H, W]``, normalised. text_embeddings: ``[T, D]``, L2-normalised.
            size: of the labels; None: (H, W).
            background_threshold: None: label t is class t. Else 0 is background, where the segment's best score is
                below min(threshold, the image's best score), and class t is t + 1.
        Returns:
            int64 ``[B, H, W]``.
        """
        size = size or (images.shape[2], images.shape[3])
        multiplier = self.logit_multiplier()
        return label_pixels(self.segments(images), text_embeddings, multiplier, size, background_threshold)
