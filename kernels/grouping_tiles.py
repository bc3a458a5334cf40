"""Functions of the grouping attention's kernels on a tile of patches by groups, or of rows by channels.

Columns of a tile are groups in the order of :func:`group_of_column`, in which noise is drawn; memory is in natural
order. `rows` of a tensor are a pointer, the offset from it at which each row starts, and which rows exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import exp2, reciprocal, rounded, upcast

# The default cache policy. Triton 3.6 takes no plain string as a default.
_NORMAL: tl.constexpr = tl.constexpr("")


@triton.jit
def group_of_column(BLOCK_GROUPS: tl.constexpr):
    """The group of each column of a tile: 0, 4, 8, …, 1, 5, 9, …"""
    column = tl.arange(0, BLOCK_GROUPS)
    return column % (BLOCK_GROUPS // 4) * 4 + column // (BLOCK_GROUPS // 4)


@triton.jit
def _tile(rows, first, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Pointers and mask of channels ``first`` to ``first + BLOCK_CHANNELS`` of `rows`."""
    base, offset, exists = rows
    channel = first + tl.arange(0, BLOCK_CHANNELS)[None, :]
    mask = exists[:, None]
    if CHANNELS % BLOCK_CHANNELS > 0:
        mask &= channel < CHANNELS
    return base + (offset[:, None] + channel), mask


@triton.jit
def load_rows(rows, first, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, EVICT: tl.constexpr = _NORMAL):
    """A tile of `rows`; 0 outside."""
    pointers, mask = _tile(rows, first, CHANNELS, BLOCK_CHANNELS)
    return upcast(tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICT))


@triton.jit
def store_rows(rows, first, x, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    pointers, mask = _tile(rows, first, CHANNELS, BLOCK_CHANNELS)
    tl.store(pointers, rounded(x, rows[0].dtype.element_ty), mask=mask)


@triton.jit
def prefetch_rows(rows, BYTES: tl.constexpr):
    """Prefetch whole rows of BYTES bytes into the L2 cache."""
    base, offset, exists = rows
    tl.inline_asm_elementwise(
        """{
            .reg .pred exists;
            setp.ne.s32 exists, $2, 0;
            @exists cp.async.bulk.prefetch.L2.global [$1], $3;
            mov.b32 $0, 0;
        }""",
        "=r,l,r,r",
        [(base + offset).to(tl.int64), exists.to(tl.int32), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_map(base, patch, group, patches, GROUPS: tl.constexpr):
    """A tile ``[P, G]`` of an image's map ``[GROUPS, patches]``; 0 outside."""
    mask = (patch < patches)[:, None] & (group < GROUPS)[None, :]
    return tl.load(base + (group[None, :] * patches + patch[:, None]), mask=mask, other=0.0)


@triton.jit
def store_map(base, patch, group, x, patches, GROUPS: tl.constexpr):
    mask = (patch < patches)[:, None] & (group < GROUPS)[None, :]
    tl.store(base + (group[None, :] * patches + patch[:, None]), rounded(x, base.dtype.element_ty), mask=mask)


@triton.jit
def inner_products(
    products, patches, groups, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, EVICT: tl.constexpr = _NORMAL
):
    """fp32 ``[P, G] <- products + [P, C] @ [C, G]``, of rows of patches and groups, each read once. EVICT: the cache
    policy of the patches."""
    for first in range(0, CHANNELS, BLOCK_CHANNELS):
        x = load_rows(patches, first, CHANNELS, BLOCK_CHANNELS, EVICT)
        y = load_rows(groups, first, CHANNELS, BLOCK_CHANNELS)
        products = tl.dot(x, tl.trans(y), products, input_precision="ieee")
    return products


@triton.jit
def weighted_sums(weights, x):
    """fp32 ``[G, C] <- [P, G], [P, C]``, of operands. The weights are the second operand of the matmul, which is read
    from shared memory; a first operand in registers would be copied to every warp."""
    return tl.trans(tl.dot(tl.trans(x), weights, input_precision="ieee"))


@triton.jit
def mask_groups(logits, group, GROUPS: tl.constexpr):
    """-inf in the columns beyond the groups."""
    if group.shape[0] > GROUPS:
        logits = tl.where((group < GROUPS)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def softmax(logits):
    """Over the groups, of logits in units of log(2); columns beyond the groups hold -inf."""
    weights = exp2(logits - tl.max(logits, axis=1)[:, None])
    return weights * reciprocal(tl.sum(weights, axis=1))[:, None]


@triton.jit
def winners(logits, group):
    """The group with the largest logit ``[P]``, the lowest among equals; BLOCK_GROUPS for a patch with a NaN."""
    largest = tl.max(tl.where(logits == logits, logits, float("inf")), axis=1)  # no finite logit equals inf
    return tl.min(tl.where(logits == largest[:, None], group[None, :], group.shape[0]), axis=1)


@triton.jit
def one_hot(winner, group):
    """fp32 ``[P, G]``, and the number of patches of each group ``[G]``: NaN everywhere if one patch has a NaN."""
    weights = (winner[:, None] == group[None, :]).to(tl.float32)
    total = tl.sum(weights, axis=0)
    return weights, tl.where(tl.max(winner) == group.shape[0], float("nan"), total)
