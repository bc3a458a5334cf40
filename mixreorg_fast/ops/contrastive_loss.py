"""Symmetric image-text contrastive loss (InfoNCE) over the global batch (GroupViT, CVPR 2022, equations 9 to 11).

How the parts fit together (docs/losses.md has the maths): every rank gathers all features, finds the log-sum-exps of
its own rows and columns of the logits, and gathers those too, a few numbers per sample. They are all that backward
needs, so gradients are never communicated, and no B x B matrix exists at any time.

Where even all features are too much, they go round in a ring, one rank's images at a time (docs/scaling.md): each
block of logits is then seen by one rank only, which passes the images on with what it has added to their log-sum-exps
and, in backward, to their gradients.
"""

from __future__ import annotations

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
            ``[B, P, D]``; L2-normalised by the caller; B equal on all ranks. fp32, bf16 or fp16 (of two dtypes, both
            are taken in the one that holds both; under autocast in its dtype, as in a matrix product); any strides.
        logit_scale: factor of the cosines, a number or a tensor of one element.
        process_group: None: the default group if torch.distributed is initialised, else this process alone.
        exchange: "gather": every rank holds all features; "ring": those of two ranks beside its own, so that memory
            grows with B alone, whatever the number of ranks. The values are the same up to rounding.
    Returns:
        0-d fp32; products accumulate in fp32, all else is fp32. The same bits on every rank and from run to run.
        Every gradient is world_size times this rank's share of the true one, so that the average over ranks that data
        parallelism takes is the gradient of the global batch's loss: for `image` and `text`, whose rows are on one
        rank alone, world_size times the true gradient; for `logit_scale` a share that becomes the true gradient with
        the average. The gradient cannot be differentiated again.
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
    prompts = text[0].numel() // text.shape[-1]

    world, own_rank = world_size(process_group), rank(process_group)
    if exchange == "ring" and world > 1:
        return _RingLoss.apply(image, texts, scale, prompts, Ring(process_group), blocks)
    all_images = all_texts = None  # those of this process
    with torch.no_grad(), without_autocast(image):
        positives = _positives(image, texts, scale)
        if world == 1:
            image_lse, text_lse = blocks.log_sum_exp(image, texts, scale, True)
        else:
            all_images, all_texts = (all_gather(x, process_group) for x in (image, texts))
            image_lse, _ = blocks.log_sum_exp(image, all_texts, scale, False)
            text_lse, _ = blocks.log_sum_exp(texts, all_images, scale, False)
            own = (image_lse, text_lse, positives)
            parts = all_gather(torch.cat(own)[None], process_group)  # [world, B + B * P + B]
            image_lse, text_lse, positives = (x.flatten() for x in parts.split([len(x) for x in own], dim=1))
        loss = (0.5 * (image_lse + text_lse.view(-1, prompts).mean(1)) - positives).mean()
    first = own_rank * len(image)
    saved = (all_images, all_texts, image_lse, text_lse)
    return _Loss.apply(image, texts, scale, loss, *saved, prompts, first, blocks)


def _positives(image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The mean logit of each image with its own prompts, fp32 ``[B]``."""
    wide = torch.promote_types(texts.dtype, torch.float32)
    products = texts.unflatten(0, (len(image), -1)).to(wide, copy=True).mul_(image.unsqueeze(1))
    return products.sum(-1).mean(1) * scale


class _Loss(torch.autograd.Function):
    """Hands the loss through and holds the log-sum-exps for its gradient."""

    @staticmethod
    def forward(ctx, image, texts, scale, loss, all_images, all_texts, image_lse, text_lse, prompts, first, blocks):
        ctx.save_for_backward(image, texts, scale, all_images, all_texts, image_lse, text_lse)
        ctx.prompts, ctx.first, ctx.blocks = prompts, first, blocks
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, texts, scale, all_images, all_texts, image_lse, text_lse = ctx.saved_tensors
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        first, prompts, alone = ctx.first, ctx.prompts, all_images is None
        grad_image = grad_text = None
        with without_autocast(image):
            if need_image or need_scale:
                block = LogitBlock(1, prompts, first, both=need_text and alone)  # one pass over the logits for both
                columns, own_lse = texts if alone else all_texts, image_lse[first : first + len(image)]
                grad_image, grad_text = ctx.blocks.gradient(image, columns, own_lse, text_lse, scale, block)
            if need_text and (grad_image is None or not alone):
                first *= prompts
                columns, own_lse = image if alone else all_images, text_lse[first : first + len(texts)]
                block = LogitBlock(prompts, 1, first, both=False)
                grad_text, _ = ctx.blocks.gradient(texts, columns, own_lse, image_lse, scale, block)
            factor = grad * (0.5 / len(image))  # world_size / (2 * global batch)
            grad_scale = (image * grad_image).sum() * factor if need_scale else None
        return *_scaled(ctx, image, texts, grad_image, grad_text, factor * scale), grad_scale, *[None] * 8


def _scaled(
    ctx, image: Tensor, texts: Tensor, grad_image: Tensor | None, grad_text: Tensor | None, factor: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of images and texts that are needed, times `factor`, in the dtypes of their inputs."""
    need_image, need_text, *_ = ctx.needs_input_grad
    return (
        (grad_image * factor).to(image.dtype) if need_image else None,
        (grad_text * factor).to(texts.dtype) if need_text else None,
    )


def ring_log_sum_exp(image: Tensor, texts: Tensor, scale: Tensor, ring: Ring, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Of this rank's images ``[B]`` over all texts and of its texts ``[B * P]`` over all images."""
    image_lse = text_lse = None
    for hop in range(ring.size):
        ahead = ring.pass_on(image) if hop + 1 < ring.size else None  # on its way while the tile is computed
        rows, columns = blocks.log_sum_exp(texts, image, scale, True)
        text_lse = rows if text_lse is None else torch.logaddexp(text_lse, rows)
        part = columns if image_lse is None else torch.logaddexp(image_lse, columns)
        (image_lse,) = ring.pass_on(part, tag=2)()
        if ahead is not None:
            (image,) = ahead()
    return image_lse, text_lse  # the last hop has brought the images' home


def ring_gradient(
    image: Tensor,
    texts: Tensor,
    image_lse: Tensor,
    text_lse: Tensor,
    scale: Tensor,
    prompts: int,
    ring: Ring,
    blocks: Blocks,
    need_image: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of this rank's images (if needed) and texts, fp32, without the factor ``scale / (2 * B)``."""
    grad_image = grad_texts = None
    for hop in range(ring.size):
        ahead = ring.pass_on(image, image_lse) if hop + 1 < ring.size else None
        # The images come from `hop` ranks behind: our samples begin that many ranks after theirs.
        block = LogitBlock(prompts, 1, hop * len(texts), need_image)
        rows, columns = blocks.gradient(texts, image, text_lse, image_lse, scale, block)
        grad_texts = rows if grad_texts is None else grad_texts.add_(rows)
        if need_image:
            part = columns if grad_image is None else grad_image.add_(columns)
            (grad_image,) = ring.pass_on(part, tag=2)()
        if ahead is not None:
            image, image_lse = ahead()
    return grad_image, grad_texts


class _RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, texts, scale, prompts, ring, blocks):
        with without_autocast(image):
            image_lse, text_lse = ring_log_sum_exp(image, texts, scale, ring, blocks)
            own = (0.5 * (image_lse + text_lse.view(-1, prompts).mean(1)) - _positives(image, texts, scale)).mean()
            ctx.save_for_backward(image, texts, scale, image_lse, text_lse)
            ctx.prompts, ctx.ring, ctx.blocks = prompts, ring, blocks
            return ring.mean(own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, texts, scale, image_lse, text_lse = ctx.saved_tensors
        need_image, _, need_scale = ctx.needs_input_grad[:3]
        with without_autocast(image):
            saved = (image, texts, image_lse, text_lse, scale)
            grad_image, grad_text = ring_gradient(*saved, ctx.prompts, ctx.ring, ctx.blocks, need_image)
            factor = grad / (2 * len(image))  # world_size / (2 * global batch)
            grad_scale = (texts * grad_text).sum() * factor if need_scale else None
        return *_scaled(ctx, image, texts, grad_image, grad_text, factor * scale), grad_scale, None, None, None
