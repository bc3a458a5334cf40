"""The grouping attention of GroupViT (CVPR 2022, section 3.2, equations 5 to 7)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .dispatch import Impl, choose
from .philox import gumbel, philox


def grouping_noise(
    batch: int, groups: int, patches: int, seed: int | Tensor, first_image: int = 0, device: torch.device | None = None
) -> Tensor:
    """Gumbel noise fp32 ``[B, G, N]``, a pure function of (seed, first_image + b, g, n).

    One Philox call gives four consecutive groups.
    """
    image = first_image + torch.arange(batch, device=device)[:, None, None]
    quad = torch.arange((groups + 3) // 4, device=device)[:, None]
    patch = torch.arange(patches, device=device)
    bits = torch.stack(philox(seed, patch, quad, image & 0xFFFFFFFF, image >> 32), dim=2)  # [B, quads, 4, N]
    return gumbel(bits.flatten(1, 2)[:, :groups])


def grouping_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    hard: bool = True,
    seed: int | Tensor | None = None,
    first_image: int = 0,
    tau: float = 1.0,
    eps: float = 1.0,
    upcast: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, soft and used assignment by the definition, computed in `upcast`; results in that dtype."""
    q, k, v = q.to(upcast), k.to(upcast), v.to(upcast)
    logits = (q @ k.mT) * scale  # [B, G, N] <- [B, G, C] @ [B, C, N]
    soft = torch.softmax(logits / tau, dim=1)
    if seed is None:
        used = soft
    else:
        noise = grouping_noise(*logits.shape, seed, first_image, logits.device).to(upcast)
        used = torch.softmax((logits + noise) / tau, dim=1)
    if hard:
        one_hot = torch.zeros_like(used).scatter_(1, used.argmax(dim=1, keepdim=True), 1.0)
        used = one_hot + (used - used.detach())  # straight-through; the added difference is exactly 0
    weights = used / (used.sum(dim=2, keepdim=True) + eps)
    return weights @ v, soft, used  # [B, G, C] <- [B, G, N] @ [B, N, C]


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
    return_assignment: Literal["none", "soft", "used"] = "none",
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Assign patches to groups by a softmax **over groups** and average each group's patches.

    ``a = softmax((q @ k.mT * scale + noise) / tau, dim=groups)``, hard one-hot with a straight-through gradient,
    ``out = (a / (a.sum(patches) + eps)) @ v``.

    Args:
        q: ``[B, G, C]``. k, v: ``[B, N, C]``. fp32, bf16 or fp16; products accumulate in fp32.
        scale: of the logits; default ``C ** -0.5``.
        hard: one-hot assignment (ties take the lowest group); its gradient is the soft one's.
        seed: int or 0-d int64 tensor; switches Gumbel noise on. The noise depends on (seed, first_image + b, g, n)
            alone and is never stored.
        tau: temperature of the softmax. eps: added to each group's number of patches.
        return_assignment: "soft" adds ``softmax(logits / tau)`` without noise, "used" the assignment that formed the
            output, fp32 ``[B, G, N]``; both differentiable.
    Returns:
        ``[B, G, C]`` in the dtype of `v`, or a pair with the assignment. Deterministic.
    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"grouping_attention: expected q [B, G, C] and k, v [B, N, C], got {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}"
        )
    if return_assignment not in ("none", "soft", "used"):
        raise ValueError(f"grouping_attention: return_assignment must be none, soft or used, got {return_assignment!r}")
    choose("grouping_attention", impl, {"torch": list})
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out, soft, used = grouping_attention_reference(
        q, k, v, scale=scale, hard=hard, seed=seed, first_image=first_image, tau=tau, eps=eps
    )
    out = out.to(v.dtype)
    if return_assignment == "none":
        return out
    return out, soft if return_assignment == "soft" else used
