"""Scaled dot-product attention behind one dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    lengths: Sequence[int] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``softmax(q kᵀ / sqrt(D)) v`` per head.

    Args:
        q: ``[B, N, H, D]``; k, v: ``[B, M, H, D]``; fp32, bf16 or fp16.
        causal: position n attends to positions up to n.
        lengths: host integers: the tensors are packed ``[1, S, H, D]``, sequence i being the next ``lengths[i]`` rows;
            rows beyond their sum are padding, and zero in the result. Sequences do not see one another.
    Returns:
        ``[B, N, H, D]``.
    Raises:
        ValueError: packed tensors whose shape `lengths` does not fit.
    """
    choose("attention", impl, {"torch": list})
    if lengths is None:
        return _dense(q, k, v, causal)
    if q.shape[0] != 1 or q.shape != k.shape or sum(lengths) > q.shape[1]:
        raise ValueError(
            f"attention: packed tensors must be [1, S, H, D] with S >= {sum(lengths)} = sum of lengths, got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    return _packed(q, k, v, causal, lengths)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Sequence[int]) -> Tensor:
    """Sequences of one length are attended together, as one dense batch."""
    rows: dict[int, list[int]] = {}
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        rows.setdefault(length, []).append(end - length)
    out = torch.zeros_like(q)
    for length, firsts in rows.items():
        index = torch.tensor(firsts, device=q.device)[:, None] + torch.arange(length, device=q.device)
        part = _dense(q[0, index], k[0, index], v[0, index], causal)  # [n, length, H, D]
        out = out.index_copy(1, index.flatten(), part.flatten(0, 1)[None])
    return out
