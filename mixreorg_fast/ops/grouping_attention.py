"""The grouping attention of GroupViT (CVPR 2022, section 3.2, equations 5 to 7)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..kernels.settings import Grouping
from .dispatch import Impl, autocast, falls_back, uses_triton, without_autocast
from .philox import draws, gumbel, seed_tensor
from .registration import kernel

ReturnAssignment = Literal["none", "soft", "used", "winner"]
MOST_GROUPS = 128  # of the kernels: a tile holds all groups


def grouping_noise(
    batch: int, groups: int, patches: int, seed: int | Tensor, first_image: int = 0, device: torch.device | None = None
) -> Tensor:
    """Gumbel noise fp32 ``[B, G, N]``, a pure function of (seed, first_image + b, g, n)."""
    return gumbel(draws(seed, first_image, batch, groups, patches, device))


def grouping_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: int | Tensor | None,
    settings: Grouping,
    *,
    upcast: torch.dtype | None = None,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, soft and used assignment by the definition, computed and returned in `upcast` (default: at least fp32).

    The assignment and the gradient of the logits, which the kernels multiply with 16-bit inputs, round to `operands`.
    """
    scale, hard, first_image, tau, eps, _ = settings
    upcast = torch.promote_types(q.dtype, torch.float32) if upcast is None else upcast
    q, k, v = q.to(upcast), k.to(upcast), v.to(upcast)
    logits = (q @ k.mT) * scale  # [B, G, N] <- [B, G, C] @ [B, C, N]
    if operands is not None and logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.to(operands).to(upcast))
    soft = torch.softmax(logits / tau, dim=1)
    if seed is None:
        used = soft
    else:
        batch, groups, patches = logits.shape
        noise = grouping_noise(batch, groups, patches, seed, first_image, logits.device).to(upcast)
        used = torch.softmax((logits + noise) / tau, dim=1)
    if hard:
        one_hot = torch.zeros_like(used).scatter_(1, used.argmax(dim=1, keepdim=True), 1.0)
        used = one_hot + (used - used.detach())  # straight-through; the added difference is exactly 0
    total = used.sum(dim=2, keepdim=True) + eps
    weights = used if operands is None else used + (used.to(operands).to(upcast) - used).detach()
    return (weights / total) @ v, soft, used  # [B, G, C] <- [B, G, N] @ [B, N, C]


@falls_back
def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    hard: bool = True,
    seed: int | Tensor | None = None,
    first_image: int = 0,
    tau: float = 1.0,
    eps: float = 1.0,
    return_assignment: ReturnAssignment = "none",
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Assign patches to groups by a softmax **over groups** and average each group's patches.

    ``a = softmax((q @ k.mT * scale + noise) / tau, dim=groups)``, hard one-hot with a straight-through gradient,
    ``out = (a / (a.sum(patches) + eps)) @ v``. GroupViT (CVPR 2022), equations 5 to 7; docs/kernels.md has the
    gradients. The kernels keep two bytes per patch for backward and no map of groups by patches unless it is returned
    (with ``hard=False``, and images of several tiles in backward, one).

    Args:
        q: ``[B, G, C]``. k, v: ``[B, N, C]``. fp32, bf16 or fp16, of one dtype; products accumulate in fp32. Views are
            read in place where the channels lie together. Under autocast the inputs are cast to its dtype.
        scale: of the logits; default ``C ** -0.5``.
        hard: one-hot assignment (ties take the lowest group); its gradient is the soft one's.
        seed: int or 0-d int64 tensor; switches Gumbel noise on. The noise depends on (seed, first_image + b, g, n)
            alone and is never stored. Another value of a tensor needs no new compilation.
        tau: temperature of the softmax. eps: added to each group's number of patches.
        return_assignment: "soft" adds ``softmax(logits / tau)`` without noise, "used" the assignment that formed the
            output, fp32 ``[B, G, N]``; both differentiable. "winner" adds each patch's group with the largest share in
            the assignment that formed the output, int64 ``[B, N]``; no map is written if that was hard.
    Returns:
        ``[B, G, C]`` in the dtype of `v`, or a pair with the assignment. Deterministic.
    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `impl` cannot run here.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"grouping_attention: expected q [B, G, C] and k, v [B, N, C], got {shapes}")
    if return_assignment not in get_args(ReturnAssignment):
        raise ValueError(
            f"grouping_attention: return_assignment must be none, soft, used or winner, got {return_assignment!r}"
        )
    q, k, v = autocast(q, k, v)
    wants_winner = return_assignment == "winner"
    written = return_assignment if not wants_winner else "none" if hard else "used"
    settings = Grouping(q.shape[2] ** -0.5 if scale is None else scale, hard, first_image, tau, eps, written)
    if uses_triton("grouping_attention", impl, q, k, v, limits=lambda: _limits(q, k, v)):
        seed = None if seed is None else seed_tensor(seed, q.device)
        out, assignment, winner, _ = _grouping_attention(q, k, v, seed, settings)
        if wants_winner:
            # A patch with a NaN has no winner; its number is clamped to a valid index.
            assignment = winner.clamp(max=q.shape[1] - 1).long() if hard else assignment.argmax(dim=1)
    else:
        with without_autocast(q):
            out, soft, used = grouping_attention_reference(q, k, v, seed, settings)
        out, assignment = out.to(v.dtype), soft if return_assignment == "soft" else used
        if wants_winner:
            assignment = used.argmax(dim=1)
    return out if return_assignment == "none" else (out, assignment)


def _limits(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    reasons = []
    if not q.dtype == k.dtype == v.dtype:
        reasons.append(f"inputs of several dtypes ({q.dtype}, {k.dtype}, {v.dtype})")
    if q.shape[1] > MOST_GROUPS:
        reasons.append(f"{q.shape[1]} groups, at most {MOST_GROUPS}")
    return reasons


# The Triton path.


@kernel("grouping_attention.grouping_backward")
def _grouping_attention_backward(
    grad_out: Tensor,
    grad_assignment: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    out: Tensor,
    winner: Tensor,
    total: Tensor,
    settings: Grouping,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _gradient(
    grad_out: Tensor | None, grad_assignment: Tensor | None, _winner: None, _total: None, *kept: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, out, _, _, settings = kept
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if settings.return_assignment == "none":
        grad_assignment = None
    return _grouping_attention_backward(grad_out, grad_assignment, *kept)


@kernel("grouping_attention.grouping_forward", gradient=_gradient, kept_outputs=(0, 2, 3))
def _grouping_attention(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, settings: Grouping
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, groups, patches = *q.shape[:2], k.shape[1]
    columns = 0 if settings.return_assignment == "none" else patches
    assignment = q.new_empty((batch, groups, columns), dtype=torch.float32)
    winner = q.new_empty((batch, patches if settings.hard else 0), dtype=torch.int16)
    return v.new_empty(q.shape), assignment, winner, q.new_empty((batch, groups), dtype=torch.float32)
