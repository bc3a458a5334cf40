"""Scaled dot-product attention behind one dispatcher, dense or over packed sequences."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from ..devices import upload
from .dispatch import choose

AttentionImpl = Literal["auto", "xformers", "varlen", "torch", "products"]

XFORMERS_INSTALLED = importlib.util.find_spec("xformers") is not None
# 2.11 is the first release whose varlen_attn takes "causal" as a window of keys.
VARLEN_INSTALLED = TorchVersion(torch.__version__) >= "2.11"

# A constant, because torch.compile cannot trace the call.
CPU_HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

# The order in which "auto" tries implementations, except where benchmarks/test_attention.py has measured another one,
# by device, form and dtype.
UNMEASURED = ("varlen", "torch", "xformers", "products")
MEASURED: dict[tuple[str, str, torch.dtype], tuple[str, ...]] = {
    # Flash attention's backward has no bf16 matmul on a CPU: 3 times as long on images, 7 times on captions.
    ("cpu", form, torch.bfloat16): ("products", "torch", "varlen", "xformers")
    for form in ("dense", "packed")
}

# The plain-PyTorch packed form pads every sequence to a multiple of this many rows and computes sequences of one padded
# length together. Narrow buckets compute less; wide buckets make fewer calls. Measured on a CPU only, for captions of
# 10 to 40 tokens, forward and backward: width 8 takes 0.7 of the time of one call per length, and 0.4 to 0.6 of that of
# a single bucket.
BUCKET_WIDTH = {"cpu": 8}
UNMEASURED_WIDTH = 32

# Devices on which the text encoder pads its rows, so that shapes repeat from step to step: the caching allocator,
# compiled graphs and CUDA graphs of a GPU reuse what they made for a shape.
BUCKETED = {"cuda"}


@dataclass(frozen=True)
class Packing:
    """How sequences of different lengths lie end to end in ``[1, S, ...]``; made once, used by every layer.

    Rows beyond the sum of the lengths are padding, cut into sequences of their own: they are computed like all others,
    and no other sequence attends to them. They hold copies of the first sequence's first row.
    """

    rows: int  # S, at least the sum of the lengths
    max_seqlen: int  # at least the longest sequence; with `bucket` a multiple of 8, so that it repeats
    cu_seqlens: Tensor  # int32 [sequences + 1], first row of each sequence, padding included; ends with S
    sequence: Tensor  # int64 [S], which sequence a row belongs to (padding: 0)
    position: Tensor  # int64 [S], its place in it (padding: 0)
    last: Tensor  # int64 [len(lengths)], last row of each sequence
    slots: Tensor  # int64 [S], place of each row once sequences are padded to their bucket's width
    buckets: tuple[tuple[int, int], ...]  # (sequences, width) of each bucket
    sequences: tuple[int, ...]  # lengths of all sequences, those of padding included

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        rows: int | None = None,
        bucket: bool = False,
    ) -> Packing:
        """Lay out sequences of `lengths`, on `device` without synchronising with the host.

        Args:
            lengths: host integers, each at least 1.
            rows: S, at least the sum of the lengths; None: the sum. Ignored with `bucket`.
            bucket: S is one of 16 values per power of two, so that shapes repeat from step to step.
        Raises:
            ValueError: no lengths, one below 1, or more than `rows` in all.
        """
        lengths, device = list(lengths), torch.device(device)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be one or more numbers above 0, got {lengths[:8]}")
        total, max_seqlen = sum(lengths), max(lengths)
        if bucket:
            # One of 16 sizes per power of two: at most 1/16 of the rows are padding (of fewer than 128 rows, 7).
            most_padding = max(8, 1 << max(total.bit_length() - 5, 0))
            rows, max_seqlen = -(-total // most_padding) * most_padding, -(-max_seqlen // 8) * 8
        else:
            rows = total if rows is None else rows
            most_padding = rows - total
        if rows < total:
            raise ValueError(f"{total} rows of {len(lengths)} sequences do not fit into {rows}")
        # As many sequences as the most padding of a bucket needs, so that their number repeats too; some may be empty.
        starts = range(0, most_padding, max_seqlen)
        sequences = [*lengths, *(min(max_seqlen, max(0, rows - total - start)) for start in starts)]

        size = torch.tensor(sequences)
        ends = size.cumsum(0)
        number = torch.repeat_interleave(torch.arange(len(sequences)), size)
        position = torch.arange(rows) - (ends - size)[number]
        step = BUCKET_WIDTH.get(device.type, UNMEASURED_WIDTH)
        width = (-(-size // step) * step).clamp(max=max_seqlen)
        order = width.argsort(stable=True)
        first = torch.empty_like(width)
        first[order] = width[order].cumsum(0) - width[order]
        slots = first[number] + position
        widths, counts = width.unique(return_counts=True)
        buckets = tuple((n, w) for n, w in zip(counts.tolist(), widths.tolist(), strict=True) if w)

        real = number < len(lengths)  # padding may exceed the L of what `pack` reads: take row (0, 0)
        row = (number.where(real, 0), position.where(real, 0))
        parts = [F.pad(ends, (1, 0)), *row, ends[: len(lengths)] - 1, slots]
        together = upload(torch.cat(parts), device)  # one copy
        cu_seqlens, sequence, position, last, slots = together.split([len(part) for part in parts])
        return cls(rows, max_seqlen, cu_seqlens.int(), sequence, position, last, slots, buckets, tuple(sequences))

    def pack(self, x: Tensor) -> Tensor:
        """``[1, S, ...]`` of padded ``[B, L, ...]``; rows of padding hold the first row."""
        return x[self.sequence, self.position][None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    lengths: Sequence[int] | Packing | None = None,
    impl: AttentionImpl = "auto",
) -> Tensor:
    """``softmax(q kᵀ / sqrt(D)) v`` per head.

    Args:
        q: ``[B, N, H, D]``; k, v: ``[B, M, H, D]``; fp32, bf16 or fp16.
        causal: position n attends to positions up to n.
        lengths: host integers: the tensors are packed ``[1, S, H, D]``, sequence i being the next ``lengths[i]`` rows,
            and each attends within itself; rows beyond their sum are finite. A :class:`Packing` serves many calls.
        impl: "torch": PyTorch's SDPA, over buckets of padded sequences where packed; "products": two batched matmuls
            around a softmax, over the same buckets (logits `[B, H, N, M]` are kept for backward); "varlen": PyTorch's
            variable-length attention; "xformers": its memory-efficient attention, block-diagonal where packed; "auto":
            the first in the measured order (`MEASURED`) that can run.
    Returns:
        ``[B, N, H, D]``.
    Raises:
        ValueError: packed tensors whose shape `lengths` does not fit. RuntimeError: `impl` cannot run here.
    """
    packing: Packing | None = None
    if lengths is not None:
        packed = isinstance(lengths, Packing)
        rows = lengths.rows if packed else sum(lengths)
        if q.shape[0] != 1 or q.shape != k.shape or rows > q.shape[1] or packed and rows != q.shape[1]:
            expected = f"S = {rows} of the packing" if packed else f"S >= {rows} = sum of lengths"
            raise ValueError(
                f"attention: packed tensors must be [1, S, H, D] with {expected}, "
                f"got {list(q.shape)} and {list(k.shape)}"
            )
        packing = lengths if isinstance(lengths, Packing) else Packing.of(lengths, q.device, rows=q.shape[1])
    return _IMPLEMENTATIONS[chosen(q, packing, impl)][1](q, k, v, causal, packing)


def chosen(q: Tensor, packing: Packing | None = None, impl: AttentionImpl = "auto") -> str:
    """The implementation that :func:`attention` runs for queries like `q`; raises what :func:`.choose` raises."""
    form = "dense" if packing is None else "packed"
    order = MEASURED.get((q.device.type, form, q.dtype), UNMEASURED)
    reasons = {name: partial(_IMPLEMENTATIONS[name][0], q, packing) for name in order}
    return choose("attention", impl, reasons, (q,))


# ---------------------------------------------------------------------- plain PyTorch


def _padded(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool, packing: Packing | None
) -> Tensor:
    """``attend(q, k, v, causal, mask)`` on ``[B, H, N, D]``; if packed, once per bucket of padded sequences."""

    def dense(*qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(*(x.transpose(1, 2) for x in qkv), causal, mask).transpose(1, 2)

    if packing is None:
        return dense(q, k, v)
    slots, size = packing.slots, sum(n * width for n, width in packing.buckets)
    q, k, v = (x.new_zeros(size, *x.shape[2:]).index_copy(0, slots, x[0]) for x in (q, k, v))
    real = None if causal else torch.zeros(size, dtype=torch.bool, device=q.device).index_fill(0, slots, True)
    parts, start = [], 0
    for count, width in packing.buckets:
        end = start + count * width
        # Padded keys follow their sequence: causal attention ignores them, other attention needs the mask.
        mask = None if real is None else real[start:end].view(count, 1, 1, width)
        part = (x[start:end].unflatten(0, (count, width)) for x in (q, k, v))
        parts.append(dense(*part, mask=mask).flatten(0, 1))  # [count * width, H, D]
        start = end
    return _Take.apply(parts[0] if len(parts) == 1 else torch.cat(parts), slots)[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _products(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    q, k = q.contiguous(), k.contiguous()  # copied here: the matmul would make a transposed copy of k
    logits = q * q.shape[-1] ** -0.5 @ k.mT  # [B, H, N, M]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1) @ v  # PyTorch's softmax computes in fp32 whatever it reads


class _Take(torch.autograd.Function):
    """``x[index]`` along the first dimension for distinct indices: its gradient is a copy, PyTorch's a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy(0, index, grad), None


# ---------------------------------------------------------------------- variable-length kernels


def _varlen(q: Tensor, k: Tensor, v: Tensor, causal: bool, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports Triton

    layout = (packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
    out = varlen_attn(q[0], k[0], v[0], *layout, window_size=(-1, 0 if causal else -1))
    return cast(Tensor, out)[None]


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, packing: Packing | None) -> Tensor:
    from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

    masks = fmha.attn_bias
    if packing is None:
        return fmha.memory_efficient_attention(q, k, v, attn_bias=masks.LowerTriangularMask() if causal else None)
    name = f"_xformers_{'causal' if causal else 'full'}"
    if name not in packing.__dict__:  # made once, and kept in the packing for all layers
        mask = masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask
        made = mask.from_seqlens([n for n in packing.sequences if n], device=packing.cu_seqlens.device)
        object.__setattr__(packing, name, made)
    return fmha.memory_efficient_attention(q, k, v, attn_bias=packing.__dict__[name])


def flash_reasons(q: Tensor) -> list[str]:
    """Why the flash kernels, which "varlen" and "xformers" call, cannot run."""
    reasons = []
    if not q.is_cuda:
        reasons.append(f"tensors on {q.device}, CUDA is needed")
    elif torch.cuda.get_device_properties(q.device).major < 8:
        reasons.append("compute capability below 8.0")
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype {q.dtype}, expected bfloat16 or float16")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        reasons.append(f"{q.shape[-1]} channels per head, expected a multiple of 8 up to 256")
    return reasons


def _varlen_reasons(q: Tensor, packing: Packing | None) -> list[str]:
    if not VARLEN_INSTALLED:
        return [f"PyTorch {torch.__version__}, 2.11 or newer is needed"]
    return [*(["takes packed tensors only"] if packing is None else []), *flash_reasons(q)]


def _xformers_reasons(q: Tensor, packing: Packing | None) -> list[str]:
    if not XFORMERS_INSTALLED:
        return ["xformers is not installed"]
    if torch.compiler.is_compiling():
        return ["torch.compile cannot trace it"]
    return [*xformers_problems(), *flash_reasons(q)]


@cache
def xformers_problems() -> list[str]:
    """Why xformers does not load, by importing it without its long warning."""
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from xformers import _cpp_lib  # pyright: ignore[reportMissingImports]
        from xformers.ops import fmha  # noqa: F401  # pyright: ignore[reportMissingImports]

        # Without its extension xformers may still call PyTorch's kernels, which "varlen" and "torch" reach directly.
        error = _cpp_lib._cpp_library_load_exception
    except Exception as failure:  # a build for another PyTorch can raise anything
        error = failure
    finally:
        log.setLevel(level)
    while error is not None and error.__cause__ is not None:
        error = error.__cause__  # the loader's message, such as "libcudart.so.12: cannot open shared object file"
    return [] if error is None else [f"xformers does not load: {str(error).strip().partition(chr(10))[0]}"]


def _products_reasons(q: Tensor, packing: Packing | None) -> list[str]:
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not CPU_HAS_BF16
    return ["this CPU has no instructions for bf16"] if slow else []


# name -> (why it cannot run, how it runs)
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., list[str]], Callable[..., Tensor]]] = {
    "varlen": (_varlen_reasons, _varlen),
    "xformers": (_xformers_reasons, _xformers),
    "torch": (lambda *_: [], partial(_padded, _sdpa)),
    "products": (_products_reasons, partial(_padded, _products)),
}
