"""Symmetric image-text contrastive loss (InfoNCE) over the global batch (GroupViT, CVPR 2022, equations 9 to 11).

How the parts fit together (docs/losses.md has the maths): every rank gathers all features, finds the log-sum-exps of
its own rows and columns of the logits, and gathers those too, a few numbers per sample. They are all that backward
needs, so gradients are never communicated, and no B x B matrix exists at any time.

Where even all features are too much, they go round in a ring, one rank's images at a time (docs/scaling.md): each
block of logits is then seen by one rank only, which passes the images on with what it has added to their log-sum-exps
and, in backward, to their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ranks import Ring, all_gather, rank, world_size
from .dispatch import Impl, autocast, choose, falls_back, triton_reasons, without_autocast
from .registration import kernel

CHUNK_ELEMENTS = 2**24  # logits that the PyTorch path holds at a time


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
        logit_scale: the multiplier of the cosines, a number or a tensor of one element.
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
    inputs = image, text = image.to(dtype), text.to(dtype)
    implementations = {"triton": lambda: triton_reasons(*inputs), "torch": list}
    kernels = _TRITON if choose("contrastive_loss", impl, implementations, inputs) == "triton" else _TORCH
    scale = multiplier(logit_scale, image.device)
    texts = text.reshape(-1, text.shape[-1])  # [B * P, D]
    prompts = text[0].numel() // text.shape[-1]

    world, own_rank = world_size(process_group), rank(process_group)
    if exchange == "ring" and world > 1:
        return _RingLoss.apply(image, texts, scale, prompts, Ring(process_group), kernels)
    with torch.no_grad(), without_autocast(image):
        positives = _positives(image, texts, scale)
        if world == 1:
            all_images = all_texts = None  # its own
            image_lse, text_lse = kernels.log_sum_exp(image, texts, scale, True)
        else:
            all_images, all_texts = (all_gather(x, process_group) for x in (image, texts))
            image_lse, _ = kernels.log_sum_exp(image, all_texts, scale, False)
            text_lse, _ = kernels.log_sum_exp(texts, all_images, scale, False)
            own = (image_lse, text_lse, positives)
            parts = all_gather(torch.cat(own)[None], process_group)  # [world, B + B * P + B]
            image_lse, text_lse, positives = (x.flatten() for x in parts.split([len(x) for x in own], dim=1))
        loss = (0.5 * (image_lse + text_lse.view(-1, prompts).mean(1)) - positives).mean()
    return _Loss.apply(
        image, texts, scale, loss, all_images, all_texts, image_lse, text_lse, prompts, world, own_rank, kernels
    )


def multiplier(logit_scale: Tensor | float, device: torch.device) -> Tensor:
    """The multiplier as a 0-d tensor on `device`, fp32 (fp64 if it was), differentiable."""
    if isinstance(logit_scale, Tensor):
        return logit_scale.to(device, torch.promote_types(logit_scale.dtype, torch.float32)).reshape(())
    return torch.full((), logit_scale, dtype=torch.float32, device=device)


def _positives(image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The mean logit of each image with its own prompts, fp32 ``[B]``."""
    wide = torch.promote_types(texts.dtype, torch.float32)
    products = texts.unflatten(0, (len(image), -1)).to(wide, copy=True).mul_(image.unsqueeze(1))
    return products.sum(-1).mean(1) * scale


class _Kernels(NamedTuple):
    """What the loss is made of. Both work on any block of rows against any block of columns: a log-sum-exp over
    columns that arrive in parts is the logaddexp of the parts', a gradient over columns in parts their sum.

    log_sum_exp(rows, columns, scale, both): of the logits ``scale * rows @ columns.T``, over every row's columns and,
        if `both`, over every column's rows (else empty), fp32.
    gradient(rows, columns, row_lse, column_lse, scale, row_prompts, column_prompts, first_row, both): the gradients of
        rows and, if `both`, of columns (else empty), fp32, but for the factor ``scale / (2 * B)``. Row r belongs to
        sample ``(first_row + r) // row_prompts``, column c to sample ``c // column_prompts``.
    """

    log_sum_exp: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int, bool], tuple[Tensor, Tensor]]


class _Loss(torch.autograd.Function):
    """Hands the loss through and holds the log-sum-exps for its gradient."""

    @staticmethod
    def forward(
        ctx, image, texts, scale, loss, all_images, all_texts, image_lse, text_lse, prompts, world, rank, kernels
    ):
        ctx.save_for_backward(image, texts, scale, all_images, all_texts, image_lse, text_lse)
        ctx.prompts, ctx.world, ctx.rank, ctx.kernels = prompts, world, rank, kernels
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, texts, scale, all_images, all_texts, image_lse, text_lse = ctx.saved_tensors
        images, samples = len(image), len(image_lse)
        first = ctx.rank * images
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        grad_image = grad_text = grad_scale = None
        factor = grad * (ctx.world / (2 * samples))
        with without_autocast(image):
            if need_image or need_scale:
                both = need_text and ctx.world == 1  # then one sweep over the logits gives both
                columns = texts if all_texts is None else all_texts
                own_lse = image_lse[first : first + images]
                grad_image, grad_text = ctx.kernels.gradient(
                    image, columns, own_lse, text_lse, scale, 1, ctx.prompts, first, both
                )
            if need_text and (ctx.world > 1 or grad_image is None):
                columns = image if all_images is None else all_images
                first *= ctx.prompts
                own_lse = text_lse[first : first + len(texts)]
                grad_text, _ = ctx.kernels.gradient(
                    texts, columns, own_lse, image_lse, scale, ctx.prompts, 1, first, False
                )
            if need_scale:
                grad_scale = (image * grad_image).sum() * factor
        factor = factor * scale
        grad_image = (grad_image * factor).to(image.dtype) if need_image else None
        grad_text = (grad_text * factor).to(texts.dtype) if need_text else None
        return grad_image, grad_text, grad_scale, *[None] * 9


def ring_log_sum_exp(
    image: Tensor, texts: Tensor, scale: Tensor, ring: Ring, kernels: _Kernels
) -> tuple[Tensor, Tensor]:
    """Of this rank's images ``[B]`` over all texts and of its texts ``[B * P]`` over all images."""
    image_lse = text_lse = None
    for hop in range(ring.size):
        ahead = ring.pass_on(image) if hop + 1 < ring.size else None  # on its way while the tile is computed
        rows, columns = kernels.log_sum_exp(texts, image, scale, True)
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
    kernels: _Kernels,
    need_image: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of this rank's images (if needed) and texts, fp32, but for the factor ``scale / (2 * B)``."""
    grad_image = grad_texts = None
    for hop in range(ring.size):
        ahead = ring.pass_on(image, image_lse) if hop + 1 < ring.size else None
        # The visitors are `hop` ranks behind: so far ahead of their samples are ours.
        rows, columns = kernels.gradient(
            texts, image, text_lse, image_lse, scale, prompts, 1, hop * len(texts), need_image
        )
        grad_texts = rows if grad_texts is None else grad_texts.add_(rows)
        if need_image:
            part = columns if grad_image is None else grad_image.add_(columns)
            (grad_image,) = ring.pass_on(part, tag=2)()
        if ahead is not None:
            image, image_lse = ahead()
    return grad_image, grad_texts


class _RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, texts, scale, prompts, ring, kernels):
        with without_autocast(image):
            image_lse, text_lse = ring_log_sum_exp(image, texts, scale, ring, kernels)
            own = (0.5 * (image_lse + text_lse.view(-1, prompts).mean(1)) - _positives(image, texts, scale)).mean()
            ctx.save_for_backward(image, texts, scale, image_lse, text_lse)
            ctx.prompts, ctx.ring, ctx.kernels = prompts, ring, kernels
            return ring.mean(own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, texts, scale, image_lse, text_lse = ctx.saved_tensors
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        with without_autocast(image):
            grad_image, grad_text = ring_gradient(
                image, texts, image_lse, text_lse, scale, ctx.prompts, ctx.ring, ctx.kernels, need_image
            )
            factor = grad / (2 * len(image))  # world_size / (2 * global batch)
            grad_scale = (texts * grad_text).sum() * factor if need_scale else None
            factor = factor * scale
            grad_image = (grad_image * factor).to(image.dtype) if need_image else None
            grad_text = (grad_text * factor).to(texts.dtype) if need_text else None
        return grad_image, grad_text, grad_scale, None, None, None


# The PyTorch path: chunks of rows.


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from operands of any dtype."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def _chunks(rows: Tensor, columns: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, len(columns)))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _log_sum_exp_torch(rows: Tensor, columns: Tensor, scale: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    row_lse, column_lse = [], None
    for chunk in _chunks(rows, columns):
        logits = _product(rows[chunk], columns.mT) * scale
        row_lse.append(logits.logsumexp(1))
        if both:
            part = logits.logsumexp(0)
            column_lse = part if column_lse is None else torch.logaddexp(column_lse, part)
    return torch.cat(row_lse), scale.new_empty(0) if column_lse is None else column_lse


def _gradient_torch(
    rows: Tensor,
    columns: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    scale: Tensor,
    row_prompts: int,
    column_prompts: int,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor]:
    grad_rows, grad_columns = [], None
    for chunk in _chunks(rows, columns):
        logits = _product(rows[chunk], columns.mT) * scale
        weights = (logits - row_lse[chunk, None]).exp_().div_(row_prompts)
        weights += (logits - column_lse).exp_().div_(column_prompts)
        del logits
        # Samples from elsewhere, which come last, have no positive among these columns.
        ours = max(0, min(len(weights), len(columns) // column_prompts * row_prompts - first_row - chunk.start))
        row = torch.arange(ours, device=rows.device)
        sample = (first_row + chunk.start + row) // row_prompts
        own = sample[:, None] * column_prompts + torch.arange(column_prompts, device=rows.device)
        weights[row[:, None], own] -= 2 / (row_prompts * column_prompts)
        if rows.is_cuda and rows.dtype == torch.bfloat16:  # fp16 has no room for the small ones
            weights = weights.bfloat16()
        grad_rows.append(_product(weights, columns))
        if both:
            part = _product(weights.mT, rows[chunk])
            grad_columns = part if grad_columns is None else grad_columns + part
    return torch.cat(grad_rows), scale.new_empty(0) if grad_columns is None else grad_columns


_TORCH = _Kernels(_log_sum_exp_torch, _gradient_torch)


# The Triton path.


def _fake_log_sum_exp(rows, columns, scale, both):
    return tuple(rows.new_empty(size, dtype=torch.float32) for size in (len(rows), len(columns) if both else 0))


def _fake_gradient(rows, columns, row_lse, column_lse, scale, row_prompts, column_prompts, first_row, both):
    return tuple(rows.new_empty(size, dtype=torch.float32) for size in (rows.shape, columns.shape if both else 0))


@kernel("contrastive_log_sum_exp", fake=_fake_log_sum_exp)
def _log_sum_exp_triton(rows: Tensor, columns: Tensor, scale: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    from ..kernels.contrastive_loss import log_sum_exp_forward

    return log_sum_exp_forward(rows, columns, scale, both)


@kernel("contrastive_gradient", fake=_fake_gradient)
def _gradient_triton(
    rows: Tensor,
    columns: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    scale: Tensor,
    row_prompts: int,
    column_prompts: int,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor]:
    from ..kernels.contrastive_loss import gradient_backward

    return gradient_backward(rows, columns, row_lse, column_lse, scale, row_prompts, column_prompts, first_row, both)


_TRITON = _Kernels(_log_sum_exp_triton, _gradient_triton)
