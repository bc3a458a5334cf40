"""Whole tokens of a vision transformer: a mixed or restored branch appended along the batch, and two branches blended.

Tokens ``[B, N + G, C]`` are N patches, then G group tokens. Each kernel writes the whole input of the next block, group
tokens included: no slices, no concatenations. A program takes the same tokens and channels of all images of a mixing
group, so it reads every row once and has the mean of the group tokens in registers. Sources are a permutation, so a
scatter has no conflicts and needs no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .patch_mixing import launch
from .settings import Appending, Blending
from .variants import with_unit_channel_stride


@triton.jit
def _tile(tokens, group_size, CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """This program's first image (int64), tokens [BLOCK_ROWS, 1], channels [1, BLOCK_CHANNELS], and which exist."""
    chunks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    program = tl.program_id(0)
    channel = program % chunks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    token = program // chunks % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    image = (program // (chunks * blocks)).to(tl.int64) * group_size
    return image, token, channel, (token < tokens) & (channel < CHANNELS)


@triton.jit
def _source(source_ptr, image, token, patches):
    """The image that each token comes from: `source` for patches, `image` itself for group tokens."""
    is_patch = token < patches
    source = tl.load(source_ptr + image * patches + token, mask=is_patch, other=0).to(tl.int64)
    return tl.where(is_patch, source, image)


@triton.jit
def _append_branch_forward_kernel(
    x_ptr,
    groups_ptr,
    source_ptr,
    out_ptr,
    sizes,
    group_size,
    strides,
    groups_strides,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch, patches, tokens = sizes
    first, token, channel, mask = _tile(tokens, group_size, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS)
    x_tile = x_ptr + token.to(tl.int64) * strides[1] + channel
    out_tile = out_ptr + token * CHANNELS + channel
    out_stride_image = tokens * CHANNELS
    last, new = HEAD * batch, (HEAD + KEEP) * batch
    is_group = mask & (token >= patches)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for member in range(group_size):
        image = first + member
        for branch in tl.static_range(HEAD):
            place = branch * batch + image
            copied = tl.load(x_tile + place * strides[0], mask=mask)
            tl.store(out_tile + place * out_stride_image, copied, mask=mask)
        place = last + _source(source_ptr, image, token, patches)
        x = tl.load(x_tile + place * strides[0], mask=mask)
        if KEEP:
            tl.store(out_tile + place * out_stride_image, x, mask=mask)
        if groups_ptr is None:
            total += x.to(tl.float32)
            tl.store(out_tile + (new + image) * out_stride_image, x, mask=mask & (token < patches))
        else:
            place = image * groups_strides[0] + (token - patches).to(tl.int64) * groups_strides[1]
            groups = tl.load(groups_ptr + place + channel, mask=is_group)
            tl.store(out_tile + (new + image) * out_stride_image, tl.where(is_group, groups, x), mask=mask)
    if groups_ptr is None:
        mean = (total / group_size).to(out_ptr.dtype.element_ty)
        for member in range(group_size):
            image = first + member
            tl.store(out_tile + (new + image) * out_stride_image, mean, mask=is_group)


@triton.jit
def _append_branch_backward_kernel(
    grad_ptr,
    source_ptr,
    grad_x_ptr,
    sizes,
    group_size,
    strides,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    KEEP: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch, patches, tokens = sizes
    first, token, channel, mask = _tile(tokens, group_size, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS)
    grad_tile = grad_ptr + token.to(tl.int64) * strides[1] + channel
    grad_x_tile = grad_x_ptr + token * CHANNELS + channel
    x_stride_image = tokens * CHANNELS
    last, new = HEAD * batch, (HEAD + KEEP) * batch
    is_group, is_patch = mask & (token >= patches), mask & (token < patches)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    if MEAN:
        for member in range(group_size):
            image = first + member
            mean += tl.load(grad_tile + (new + image) * strides[0], mask=is_group, other=0.0).to(tl.float32)
        mean /= group_size
    for member in range(group_size):
        image = first + member
        for branch in tl.static_range(HEAD):
            place = branch * batch + image
            copied = tl.load(grad_tile + place * strides[0], mask=mask)
            tl.store(grad_x_tile + place * x_stride_image, copied, mask=mask)
        place = last + _source(source_ptr, image, token, patches)
        grad = mean + tl.load(grad_tile + (new + image) * strides[0], mask=is_patch, other=0.0).to(tl.float32)
        if KEEP:
            grad += tl.load(grad_tile + place * strides[0], mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_tile + place * x_stride_image, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _blend_tokens_kernel(
    x_ptr,
    source_ptr,
    out_ptr,
    alpha,
    sizes,
    group_size,
    strides,
    CHANNELS: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """`x` and `out` are the tokens of both branches, or with ADJOINT the gradients of the output and of the input."""
    batch, patches, tokens = sizes
    first, token, channel, mask = _tile(tokens, group_size, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS)
    x_tile = x_ptr + token.to(tl.int64) * strides[1] + channel
    out_tile = out_ptr + token * CHANNELS + channel
    out_stride_image = tokens * CHANNELS
    dtype = out_ptr.dtype.element_ty
    is_patch = token < patches
    for member in range(group_size):
        image = first + member
        source = _source(source_ptr, image, token, patches)
        original = tl.load(x_tile + source * strides[0], mask=mask).to(tl.float32)
        mixed = tl.load(x_tile + (batch + image) * strides[0], mask=mask).to(tl.float32)
        if ADJOINT:
            original = tl.where(is_patch, original + alpha * mixed, original)
            mixed = tl.where(is_patch, (1.0 - alpha) * mixed, mixed)
        else:
            mixed = tl.where(is_patch, mixed + alpha * (original - mixed), mixed)
        tl.store(out_tile + source * out_stride_image, original.to(dtype), mask=mask)
        tl.store(out_tile + (batch + image) * out_stride_image, mixed.to(dtype), mask=mask)


def append_branch_forward(x: Tensor, groups: Tensor | None, source: Tensor, settings: Appending, out: Tensor) -> None:
    """Append a branch to tokens ``[branches * B, N + G, C]``: the last branch's patches from ``source [B, N]``, and as
    group tokens `groups` ``[B, G, C]`` or the mixing group's mean. Without ``settings.keep`` the new branch replaces
    the last one."""
    x = with_unit_channel_stride(x)
    (images, tokens, _), (batch, patches), (group_size, keep, _) = x.shape, source.shape, settings
    groups = groups if groups is None else with_unit_channel_stride(groups)
    groups_strides = (0, 0) if groups is None else groups.stride()[:2]
    sizes = (batch, patches, tokens)
    arguments = (x, groups, source.contiguous(), out, sizes, group_size, x.stride()[:2], groups_strides)
    constexprs = {"HEAD": images // batch - 1, "KEEP": int(keep)}
    launch(_append_branch_forward_kernel, arguments, out, tokens, batch // group_size, **constexprs)


def append_branch_backward(grad: Tensor, source: Tensor, settings: Appending, out: Tensor) -> None:
    """Gradient of the `x` of :func:`append_branch_forward`."""
    grad = with_unit_channel_stride(grad)
    tokens, (batch, patches), (group_size, keep, mean) = grad.shape[1], source.shape, settings
    arguments = (grad, source.contiguous(), out, (batch, patches, tokens), group_size, grad.stride()[:2])
    constexprs = {"HEAD": out.shape[0] // batch - 1, "KEEP": int(keep), "MEAN": mean}
    launch(_append_branch_backward_kernel, arguments, out, tokens, batch // group_size, **constexprs)


def blend_tokens(x: Tensor, source: Tensor, settings: Blending, out: Tensor) -> None:
    """Blend original patches from ``source [B, N]`` into the mixed ones of tokens ``[2B, N + G, C]``, original branch
    then mixed; or with ``settings.adjoint`` the gradient of the input from that of the output."""
    x = with_unit_channel_stride(x)
    tokens, (batch, patches), (group_size, alpha, adjoint) = x.shape[1], source.shape, settings
    arguments = (x, source.contiguous(), out, alpha, (batch, patches, tokens), group_size, x.stride()[:2])
    launch(_blend_tokens_kernel, arguments, out, tokens, batch // group_size, ADJOINT=adjoint)
