"""Symmetric image-text contrastive loss (InfoNCE) over the global batch (GroupViT, CVPR 2022, equations 9 to 11)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose


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


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    process_group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``(image -> text + text -> image) / 2``, the mean over the global batch, the same on every rank.

    Args:
        image: ``[B, D]``, text: ``[B, D]`` or, several positive prompts per image (GroupViT's multi-label loss),
            ``[B, P, D]``; L2-normalised by the caller; B equal on all ranks.
        logit_scale: the multiplier of the cosines.
        process_group: None: the default group if torch.distributed is initialised, else this process alone.
    Returns:
        0-d fp32. The gradient to `image` and `text` is world_size times the true one, so that the average over ranks
        that data parallelism takes of parameter gradients is the gradient of the global batch's loss; the gradient to
        `logit_scale` is the true one.
    Raises:
        ValueError: shapes that do not fit together.
    """
    if image.dim() != 2 or text.dim() not in (2, 3) or (text.shape[0], text.shape[-1]) != tuple(image.shape):
        raise ValueError(
            f"contrastive_loss: expected image [B, D] and text [B, D] or [B, P, D], got {list(image.shape)} and "
            f"{list(text.shape)}"
        )
    choose("contrastive_loss", impl, {"torch": list})
    image, text = image.float(), text.float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
        image, text = _Gather.apply(image, process_group), _Gather.apply(text, process_group)
    return contrastive_loss_reference(image, text, logit_scale)


class _Gather(torch.autograd.Function):
    """All ranks' rows. Every rank then computes the same loss, so its gradient to the own rows is complete: backward
    needs no communication, only the factor world_size that the averaging of parameter gradients takes away again."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.world, ctx.rank, ctx.rows = dist.get_world_size(group), dist.get_rank(group), x.shape[0]
        out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.world)]
        dist.all_gather(out, x.contiguous(), group=group)
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows] * ctx.world, None
