"""The segmentation loss of mixed images (MixReorg, ICCV 2023, section 3; the formula is ours: docs/losses.md)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, falls_back, scale_tensor, uses_triton, without_autocast
from .patch_mixing import MixPlan
from .registration import kernel

Negatives = Literal["group", "batch", "attributed"]
LIMITS = {"G1": 128, "G2": 64, "group_size": 64}  # what the kernels' registers hold


def texts_of_groups(texts: Tensor, group_size: int) -> Tensor:
    """The texts of each image's mixing group, ``[B, K, D]`` of ``[B, D]``."""
    return texts.unflatten(0, (-1, group_size)).repeat_interleave(group_size, dim=0)


def mixed_segmentation_logits(
    first: Tensor, second: Tensor, segments: Tensor, texts: Tensor, logit_scale: Tensor | float, upcast: torch.dtype
) -> Tensor:
    """Logits ``[B, N, T]`` of each patch over texts ``[T, D]`` or ``[B, T, D]``, in `upcast`, under autocast too.

    Re-associated as ``firstᵀ (secondᵀ (segments · textsᵀ))``: G1 x T numbers per image, never ``[B, N, G2]``.
    """
    with without_autocast(first):
        first, second, segments, texts = (x.to(upcast) for x in (first, second, segments, texts))
        scores = segments @ texts.mT * logit_scale  # [B, G2, T]
        return first.mT @ (second.mT @ scores)  # [B, N, T] <- [B, N, G1] @ ([B, G1, G2] @ [B, G2, T])


def mixed_segmentation_loss_reference(
    first: Tensor,
    second: Tensor,
    segments: Tensor,
    texts: Tensor,
    source: Tensor,
    group_size: int,
    logit_scale: Tensor | float,
    *,
    negatives: Negatives = "group",
    first_text: int = 0,
    return_accuracy: bool = False,
    upcast: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mean cross-entropy, and the accuracy if wanted, computed in `upcast`; `source`: of a :class:`MixPlan`."""
    maps, labels = (first, second, segments), (source % group_size).long()
    own = texts if negatives == "group" else texts[first_text : first_text + len(first)]
    # With the batch's negatives they serve the accuracy alone.
    with torch.set_grad_enabled(torch.is_grad_enabled() and negatives != "batch"):
        of_group = mixed_segmentation_logits(*maps, texts_of_groups(own, group_size), logit_scale, upcast)
    if negatives == "group":
        loss = _cross_entropy(of_group, labels)
    else:
        of_batch, sources = mixed_segmentation_logits(*maps, texts, logit_scale, upcast), (source + first_text).long()
        if negatives == "batch":
            loss = _cross_entropy(of_batch, sources)
        else:
            within = _cross_entropy(of_group, labels, reduction="none")
            among_all = _cross_entropy(of_batch, sources, reduction="none")
            loss = within.lerp(among_all, attribution(within, group_size)).mean()
    return (loss, (of_group.argmax(-1) == labels).float().mean()) if return_accuracy else loss


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def attribution(losses: Tensor, group_size: int) -> Tensor:
    """How surely patches are attributed to their images, without gradients: 1 where a patch's own text has probability
    1 within the group, 0 at chance or below. `losses`: the patches' cross-entropies within the group."""
    return ((group_size * (-losses.detach()).exp() - 1) / max(group_size - 1, 1)).clamp(min=0)


@falls_back
def mixed_segmentation_loss(
    first: Tensor,
    second: Tensor,
    segments: Tensor,
    texts: Tensor,
    plan: MixPlan,
    logit_scale: Tensor | float,
    *,
    negatives: Negatives = "group",
    first_text: int = 0,
    return_accuracy: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of every mixed patch against the image it came from, over the texts of its mixing group.

    For image b of the group with the texts t_0..t_{K-1},
    ``logits[n, k] = logit_scale * (first[b].T @ second[b].T @ segments[b] @ t.T)[n, k]`` and
    ``loss = mean over b, n of (logsumexp(logits[n]) - logits[n, source[b, n] % K])``.

    Args:
        first: ``[B, G1, N]``, assignment of patches to stage-1 segments. second: ``[B, G2, G1]``.
        segments: ``[B, G2, D]`` and texts: ``[B, D]``, L2-normalised by the caller. The four may differ in dtype
            (fp32, bf16, fp16) and have any strides (the kernel copies what is not contiguous).
        plan: the mixing of these B images.
        logit_scale: factor of the cosines, a number or a tensor of one element.
        negatives: "group" compares every patch with the texts of its mixing group, "batch" with all texts. "attributed"
            interpolates the loss of each patch from that of "group" to that of "batch", by how surely the patch is
            attributed to its image within the group (:func:`attribution`). "batch" and "attributed" run in PyTorch only
            and hold ``[B, N, T]``; their texts may be those of more images, ``[T, D]``, where those of the B images
            begin at `first_text`.
        return_accuracy: adds the share of patches whose largest logit over the texts of their mixing group is that of
            their image, for every kind of `negatives`; ties take the lowest text.
    Returns:
        0-d fp32, the mean over B·N patches, or a pair with the accuracy, 0-d fp32; both in fp32, under autocast too.
        The loss is differentiable in the five tensors; deterministic. Backward recomputes: only the inputs are kept.
    Raises:
        ValueError: unknown negatives, shapes that do not fit together, a batch that does not split into groups of the
            plan's size.
        RuntimeError: `impl` cannot run here.
    """
    if negatives not in get_args(Negatives):
        raise ValueError(f"mixed_segmentation_loss: negatives must be group, batch or attributed, got {negatives!r}")
    own_texts = texts if negatives == "group" else texts[first_text : first_text + len(first)]
    _check(first, second, segments, own_texts, plan)
    inputs, size = (first, second, segments, texts, plan.source), plan.group_size
    scale = scale_tensor(logit_scale, first.device)
    if uses_triton("mixed_segmentation_loss", impl, *inputs, limits=lambda: _limits(first, second, plan, negatives)):
        losses, correct = _mixed_segmentation(*inputs, scale.float(), size)
        return (losses.mean(), correct.float().mean()) if return_accuracy else losses.mean()
    wide = torch.promote_types(first.dtype, torch.float32)
    return mixed_segmentation_loss_reference(
        *inputs, size, scale, negatives=negatives, first_text=first_text, return_accuracy=return_accuracy, upcast=wide
    )


def _check(first: Tensor, second: Tensor, segments: Tensor, texts: Tensor, plan: MixPlan) -> None:
    fits = (
        (first.dim(), second.dim(), segments.dim()) == (3, 3, 3)
        and second.shape == (first.shape[0], segments.shape[1], first.shape[1])
        and texts.shape == (first.shape[0], segments.shape[2])
        and segments.shape[0] == first.shape[0]
        and plan.source.shape == (first.shape[0], first.shape[2])
    )
    if not fits:
        raise ValueError(
            "mixed_segmentation_loss: expected first [B, G1, N], second [B, G2, G1], segments [B, G2, D], "
            f"texts [B, D] and a plan of [B, N], got {list(first.shape)}, {list(second.shape)}, "
            f"{list(segments.shape)}, {list(texts.shape)} and {list(plan.source.shape)}"
        )
    if plan.group_size < 1 or first.shape[0] % plan.group_size:
        raise ValueError(
            f"mixed_segmentation_loss: {len(first)} images do not split into mixing groups of {plan.group_size}"
        )


def _limits(first: Tensor, second: Tensor, plan: MixPlan, negatives: str) -> list[str]:
    sizes = {"G1": first.shape[1], "G2": second.shape[1], "group_size": plan.group_size}
    reasons = [f"{name} = {size} is above {LIMITS[name]}" for name, size in sizes.items() if size > LIMITS[name]]
    return reasons if negatives == "group" else ["negatives of the whole batch", *reasons]


# The Triton path.


@kernel("mixed_segmentation_loss.mixed_segmentation_backward")
def _mixed_segmentation_backward(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    segments: Tensor,
    texts: Tensor,
    source: Tensor,
    scale: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_first, of_second, of_segments, of_texts = (x.new_empty(x.shape) for x in (first, second, segments, texts))
    return of_first, of_second, of_segments, of_texts, torch.empty_like(scale)


def _gradient(grad: Tensor, _: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    *gradients, scale = _mixed_segmentation_backward(grad, *inputs)
    return *gradients, None, scale


@kernel("mixed_segmentation_loss.mixed_segmentation_forward", gradient=_gradient)
def _mixed_segmentation(
    first: Tensor, second: Tensor, segments: Tensor, texts: Tensor, source: Tensor, scale: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """The loss of each patch, fp32 ``[B, N]``, and whether its image has its largest logit, bool; `scale` 0-d fp32."""
    patches = first.shape[0], first.shape[2]
    return first.new_empty(patches, dtype=torch.float32), first.new_empty(patches, dtype=torch.bool)
