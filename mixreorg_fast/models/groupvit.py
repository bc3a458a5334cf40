"""GroupViT (CVPR 2022): the backbone, and all that is left of MixReorg at test time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import InferenceConfig, ModelConfig
from ..errors import UserError
from ..inference.class_scores import class_scores, image_threshold
from .encoders import ImageEncoder, TextEncoder
from .layers import Projection

if TYPE_CHECKING:
    from ..data.text.tokenizer import Tokenizer
    from ..inference.segmenter import Segmentation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Segments:
    """The final segments of images and where they lie."""

    maps: Tensor  # fp32 [B, G, h, w]: probability of each segment per patch, the product of both soft assignments
    embeddings: Tensor  # fp32 [B, G, D], L2-normalised
    image: Tensor  # fp32 [B, D], L2-normalised embedding of the pooled image
    stages: tuple[Tensor, ...] = ()  # such maps of every grouping stage, finest first; the last are `maps`


class GroupViT(nn.Module):
    """Image and text encoders with their projections into one embedding.

    Args:
        config: sizes; `config.text.vocab_size` must be set.
        mean, std: per-channel normalisation of RGB in 0..1 that `images` have gone through.
        inference: how these weights see and name photos; None: GroupViT's way, at twice the training size (448 px).
    """

    def __init__(
        self,
        config: ModelConfig,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        tokenizer: Tokenizer | None = None,
        inference: InferenceConfig | None = None,
    ):
        super().__init__()
        if not config.text.vocab_size:
            raise ValueError("config.text.vocab_size is 0; set it to the tokenizer's size")
        self.config = config
        self.mean, self.std = tuple(mean), tuple(std)
        self.tokenizer = tokenizer
        self.inference = inference or InferenceConfig(short_side=2 * config.image_size)
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config.text)
        self.image_projection = Projection(config.width, config.projection_hidden, config.embed_dim)
        self.text_projection = Projection(config.text.width, config.projection_hidden, config.embed_dim)
        # Its logarithm, of shape [1]: DeepSpeed crashes on 0-d parameters. Weight files hold it 0-d, as others do.
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
        """What cosines are multiplied with, 0-d fp32: the exponential of the parameter, at most 100."""
        return self.logit_scale.float().exp().clamp(max=100.0).squeeze(0)

    # ------------------------------------------------------------------ evaluation: only the original branch runs

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """L2-normalised ``[B, D]`` of normalised RGB images ``[B, 3, H, W]``, H and W multiples of the patch size."""
        return self._encode(images)[0]

    @torch.no_grad()
    def text_embeddings(self, ids: Tensor, *, normalise: bool = True, lengths: Sequence[int] | None = None) -> Tensor:
        """``[B, D]`` of token ids int64 ``[B, L]``, pooled at the first occurrence of the highest id.

        L2-normalised, unless they are to be averaged first. With `lengths` (host integers, up to and with that id) a
        GPU need not be asked where it is.
        """
        return self.text_projection(self.text_encoder(ids, self.dtype, lengths), normalise=normalise)

    @torch.no_grad()
    def grouping(self, images: Tensor) -> Tensor:
        """Soft map of patches to final segments, fp32 ``[B, G, h, w]`` (sums to 1 over G)."""
        return self._encode(images)[2][-1]

    @torch.no_grad()
    def segments(self, images: Tensor) -> Segments:
        """Maps and embeddings of the final segments of images ``[B, 3, H, W]``."""
        image, tokens, stages = self._encode(images)
        embeddings = self.image_projection(tokens.flatten(0, 1))
        return Segments(stages[-1], embeddings.unflatten(0, tokens.shape[:2]), image, stages)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Image embedding ``[B, D]``, final segment tokens ``[B, G, C]``, soft maps ``[B, G, h, w]`` of each stage."""
        encoder = self.image_encoder
        x, maps = encoder.begin(images, self.dtype), []
        for number, stage in enumerate(encoder.stages):
            for block in stage.blocks:
                x = block(x)
            if stage.grouping is None:
                break
            queries, *qkv = stage.prepare(x)
            # The aggregation stays hard and noiseless; the maps are the soft assignments.
            collected, soft = ops.grouping_attention(
                *qkv, hard=self.config.hard_assignment, tau=self.config.tau, return_assignment="soft"
            )
            x = encoder.advance(x, queries, collected, number)
            maps.append(soft @ maps[-1] if maps else soft)  # [B, G2, N] <- [B, G2, G1] @ [B, G1, N]
        tokens, pooled = encoder.end(x)
        height = images.shape[2] // encoder.patch_size
        image = self.image_projection(pooled)
        return image, tokens, tuple(of_stage.unflatten(2, (height, -1)) for of_stage in maps)

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
        return self._decode(self.segments(images), text_embeddings, size or images.shape[2:], background_threshold)

    def _decode(
        self, segments: Segments, texts: Tensor, size: Sequence[int], background_threshold: float | None
    ) -> Tensor:
        scores = class_scores(segments.embeddings, segments.image, texts, self.logit_multiplier())
        threshold = None if background_threshold is None else image_threshold(scores, background_threshold)
        return ops.decode_segments(segments.maps, scores, tuple(size), background_threshold=threshold)

    def segment(
        self,
        image: Any,
        classes: str | Sequence[str],
        *,
        templates: str | Sequence[str] | None = None,
        short_side: int | None = None,
        background_threshold: float | None = None,
        decoding: str = "direct",
        **options: Any,
    ) -> Segmentation | list[Segmentation]:
        """Segment a photo, or a list of photos, by class names.

        What is not given is as :attr:`inference` says, the settings that these weights carry.

        Args:
            image: a path, bytes, a binary file, a Pillow image or an array (see
                :func:`~mixreorg_fast.images.load_image`); or a list or tuple of them, which gives a list.
            classes: names, such as ``"cat, dog, sofa"`` or ``["cat", "dog", "sofa"]``
                (see :func:`~mixreorg_fast.names.parse_classes`).
            templates: one prompt template, several, or the name of a set
                (see :func:`~mixreorg_fast.names.parse_templates`).
            short_side: pixels at which the network sees the photo.
            background_threshold: 0..1: segments whose best score is below min(this, the image's best score) are
                background, and "background" becomes the first class. 0: no background.
            decoding, options: as of :class:`~mixreorg_fast.config.InferenceConfig`.
        Raises:
            UserError: no picture, no classes, an option that does not fit, or weights without a tokenizer.
        """
        from ..inference.segmenter import Segmenter  # which is built on this module

        if self.tokenizer is None:
            raise UserError("these weights have no tokenizer; segment_labels takes text embeddings instead")
        settings = self.inference.with_options(
            templates=templates,
            short_side=short_side,
            background_threshold=background_threshold,
            decoding=decoding,
            **options,
        )
        segmenter = Segmenter.of_classes(self, classes, settings)
        if isinstance(image, list | tuple):
            return [segmenter.photo(each).long() for each in image]
        return segmenter.photo(image).long()
