"""Symmetric image-text contrastive loss (InfoNCE) over the global batch (GroupViT, CVPR 2022, equations 9 to 11).

Every rank gathers all features, computes the log-sum-exps of its own rows and columns of the logits, and gathers those
too. Backward needs nothing else, and no B x B matrix is ever stored (docs/losses.md has the maths). Where all features
are too large, images travel around a ring of ranks, with the log-sum-exps and gradients summed so far
(docs/scaling.md).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.settings import LogitBlock
from ..ranks import Ring, all_gather, rank, world_size
from .contrastive_blocks import TORCH, TRITON, Blocks
from .dispatch import Impl, autocast, falls_back, scale_tensor, uses_triton, without_autocast


def contrastive_loss_reference(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The loss of one whole batch: image ``[B, D]``, text ``[B, D]`` or ``[B, P, D]``, computed in their dtype."""
    batch = image.shape[0]
    texts = text.reshape(batch, -1, text.shape[-1])  # [B, P, D]
    prompts = texts.shape[1]
    logits = image @ texts.flatten(0, 1).mT * logit_scale  # [B, B * P]
    own = torch.arange(batch, device=image.device)
    # Every prompt of an image is a positive of equal weight: the cross-entropy's target is their mean.
    positives = logits.view(batch, batch, prompts)[own, own].mean(dim=1)
    image_to_text = (torch.logsumexp(logits, dim=1) - positives).mean()
    text_to_image = F.cross_entropy(logits.mT, own.repeat_interleave(prompts))
    return 0.5 * (image_to_text + text_to_image)


@falls_back
def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    process_group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    impl: Impl = "auto",
) -> Tensor:
    """``(image -> text + text -> image) / 2``, the mean over the global batch, the same on every rank.

    With one text per image and ``logits = logit_scale * images @ texts.T`` of all ranks' rows::

        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    With P prompts per image, image -> text has the mean of an image's prompts as its target, and text -> image is the
    mean over all prompts.

    Args:
        image: ``[B, D]``, text: ``[B, D]`` or, several positive prompts per image (GroupViT's multi-label loss),
            ``[B, P, D]``; L2-normalised by the caller; B equal on all ranks. fp32, bf16 or fp16; any strides. Two
            dtypes are promoted to one; autocast casts both, as for a matmul.
        logit_scale: factor of the cosines, a number or a tensor of one element.
        process_group: None: the default group if torch.distributed is initialised, else this process only.
        exchange: with "gather" every rank holds all features; with "ring" it holds its own and two other ranks', so
            that memory does not grow with the number of ranks. Both give the same values up to rounding.
    Returns:
        0-d fp32; products accumulate in fp32, all else is fp32. The same bits on every rank and from run to run.
        Every gradient is world_size times this rank's share of the true one: data parallelism averages over ranks, and
        the average is then the gradient of the global batch's loss. Rows of `image` and `text` lie on one rank, so
        their gradient is world_size times the true one. The gradient cannot be differentiated again.
    Raises:
        ValueError: shapes that do not fit together, an unknown `exchange`. RuntimeError: `impl` cannot run here.
    """
    if exchange not in ("gather", "ring"):
        raise ValueError(f"contrastive_loss: exchange '{exchange}' is neither 'gather' nor 'ring'")
    if image.dim() != 2 or text.dim() not in (2, 3) or (text.shape[0], text.shape[-1]) != tuple(image.shape):
        raise ValueError(
            f"contrastive_loss: expected image [B, D] and text [B, D] or [B, P, D], got {list(image.shape)} and "
            f"{list(text.shape)}"
        )
    image, text = autocast(image, text)
    dtype = torch.promote_types(image.dtype, text.dtype)
    image, text = image.to(dtype), text.to(dtype)
    blocks = TRITON if uses_triton("contrastive_loss", impl, image, text) else TORCH
    scale = scale_tensor(logit_scale, image.device)
    texts = text.reshape(-1, text.shape[-1])  # [B * P, D]
    if exchange == "ring" and world_size(process_group) > 1:
        return _RingLoss.apply(image, texts, scale, Ring(process_group), blocks)
    return _GatherLoss.apply(image, texts, scale, process_group, blocks)


def _positives(image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The mean logit of each image with its own prompts, fp32 ``[B]``."""
    products = texts.to(torch.promote_types(texts.dtype, torch.float32), copy=True)
    if texts.shape[0] == image.shape[0]:
        return products.mul_(image).sum(-1) * scale
    products = products.unflatten(0, (image.shape[0], -1)).mul_(image.unsqueeze(1))
    return products.sum(-1).mean(1) * scale


def _mean_loss(image_lse: Tensor, text_lse: Tensor, positives: Tensor) -> Tensor:
    """Over images; of each image over its prompts."""
    if text_lse.shape[0] != image_lse.shape[0]:
        text_lse = text_lse.unflatten(0, (image_lse.shape[0], -1)).mean(1)
    return (0.5 * (image_lse + text_lse) - positives).mean()


def _scaled(grad: Tensor | None, factor: Tensor, x: Tensor, needed: bool) -> Tensor | None:
    """`grad`, which is overwritten, times `factor`, in the dtype of `x`; None if not needed."""
    return grad.mul_(factor).to(x.dtype) if grad is not None and needed else None


class _GatherLoss(torch.autograd.Function):
    """Every rank gathers all features, and keeps them and all log-sum-exps for backward."""

    @staticmethod
    def forward(ctx, image, texts, scale, group, blocks):
        ctx.blocks, ctx.first = blocks, 0
        all_images = all_texts = None  # those of this process
        with without_autocast(image):
            positives = _positives(image, texts, scale)
            if world_size(group) == 1:
                image_lse, text_lse = blocks.log_sum_exp(image, texts, scale, True)
            else:
                ctx.first = rank(group) * image.shape[0]
                all_images, all_texts = (all_gather(x, group) for x in (image, texts))
                image_lse, _ = blocks.log_sum_exp(image, all_texts, scale, False)
                text_lse, _ = blocks.log_sum_exp(texts, all_images, scale, False)
                own = (image_lse, text_lse, positives)
                parts = all_gather(torch.cat(own)[None], group)  # [world, B + B * P + B]
                image_lse, text_lse, positives = (x.flatten() for x in parts.split([len(x) for x in own], dim=1))
            ctx.save_for_backward(image, texts, scale, all_images, all_texts, image_lse, text_lse)
            return _mean_loss(image_lse, text_lse, positives)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, texts, scale, all_images, all_texts, image_lse, text_lse = ctx.saved_tensors
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        first, prompts, alone = ctx.first, texts.shape[0] // image.shape[0], all_images is None
        grad_image = grad_text = None
        with without_autocast(image):
            if need_image or need_scale:
                block = LogitBlock(1, prompts, first, both=need_text and alone)  # one pass over the logits for both
                columns, own_lse = texts if alone else all_texts, image_lse[first : first + image.shape[0]]
                grad_image, grad_text = ctx.blocks.gradient(image, columns, own_lse, text_lse, scale, block)
            if need_text and (grad_image is None or not alone):
                first *= prompts
                columns, own_lse = image if alone else all_images, text_lse[first : first + texts.shape[0]]
                block = LogitBlock(prompts, 1, first, both=False)
                grad_text, _ = ctx.blocks.gradient(texts, columns, own_lse, image_lse, scale, block)
            factor = grad * (0.5 / image.shape[0])  # world_size / (2 * global batch)
            grad_scale = (image * grad_image).sum() * factor if need_scale else None
            factor = factor * scale
            grad_image = _scaled(grad_image, factor, image, need_image)
            grad_text = _scaled(grad_text, factor, texts, need_text)
        return grad_image, grad_text, grad_scale, None, None


def ring_log_sum_exp(image: Tensor, texts: Tensor, scale: Tensor, ring: Ring, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Of this rank's images ``[B]`` over all texts and of its texts ``[B * P]`` over all images."""
    wide = torch.promote_types(image.dtype, torch.float32)
    image_lse, text_lse = (torch.full(x.shape[:1], -math.inf, dtype=wide, device=x.device) for x in (image, texts))
    for hop in range(ring.size):
        ahead = ring.pass_on(image) if hop + 1 < ring.size else None  # on its way while the block is computed
        rows, columns = blocks.log_sum_exp(texts, image, scale, True)
        text_lse = torch.logaddexp(text_lse, rows)
        (image_lse,) = ring.pass_on(torch.logaddexp(image_lse, columns), tag=2)()
        if ahead is not None:
            (image,) = ahead()
    return image_lse, text_lse  # the last hop has returned the images' to their rank


def ring_gradient(
    image: Tensor,
    texts: Tensor,
    image_lse: Tensor,
    text_lse: Tensor,
    scale: Tensor,
    ring: Ring,
    blocks: Blocks,
    need_image: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of this rank's images (if needed) and texts, fp32, without the factor ``scale / (2 * B)``."""
    wide, prompts = torch.promote_types(image.dtype, torch.float32), texts.shape[0] // image.shape[0]
    grad_image, grad_texts = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (image, texts))
    for hop in range(ring.size):
        ahead = ring.pass_on(image, image_lse) if hop + 1 < ring.size else None
        # The images come from `hop` ranks behind: our samples begin that many ranks after theirs.
        block = LogitBlock(prompts, 1, hop * texts.shape[0], need_image)
        rows, columns = blocks.gradient(texts, image, text_lse, image_lse, scale, block)
        grad_texts.add_(rows)
        if need_image:
            (grad_image,) = ring.pass_on(grad_image.add_(columns), tag=2)()
        if ahead is not None:
            image, image_lse = ahead()
    return grad_image if need_image else None, grad_texts


class _RingLoss(torch.autograd.Function):
    """Every rank holds its own log-sum-exps; images travel around the ring in forward and in backward."""

    @staticmethod
    def forward(ctx, image, texts, scale, ring, blocks):
        ctx.ring, ctx.blocks = ring, blocks
        with without_autocast(image):
            image_lse, text_lse = ring_log_sum_exp(image, texts, scale, ring, blocks)
            ctx.save_for_backward(image, texts, scale, image_lse, text_lse)
            return ring.mean(_mean_loss(image_lse, text_lse, _positives(image, texts, scale)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, texts, scale, image_lse, text_lse = ctx.saved_tensors
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        with without_autocast(image):
            saved = (image, texts, image_lse, text_lse, scale)
            grad_image, grad_text = ring_gradient(*saved, ctx.ring, ctx.blocks, need_image)
            factor = grad / (2 * image.shape[0])  # world_size / (2 * global batch)
            grad_scale = (texts * grad_text).sum() * factor if need_scale else None
            factor = factor * scale
            grad_image = _scaled(grad_image, factor, image, need_image)
            grad_text = _scaled(grad_text, factor, texts, need_text)
        return grad_image, grad_text, grad_scale, None, None
