"""Patch mixing: a gather of patches across the images of a group, and the blend that is fused with it.

These kernels only move memory: each tensor is read once and written once, in tiles of rows (a row is one patch of one
image) by channels. Sources are a permutation at every position, so backward is a gather by the inverse, or a scatter by
the source, which has no conflicts: no atomics, no sort.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from .variants import Config, cdiv, next_power_of_2, tuned, with_unit_channel_stride

CONFIGS = {80: Config({"BLOCK_ROWS": 16}, num_warps=4)}
PLAN_BLOCK = 128
CANDIDATES = [Config({"BLOCK_ROWS": rows}, num_warps=warps) for rows in (4, 8, 16, 32, 64) for warps in (1, 2, 4, 8)]


@triton.jit
def _rows(source_ptr, rows, patches, BLOCK_ROWS: tl.constexpr):
    """This program's rows [BLOCK_ROWS] as (row, image, patch), int64, which of them exist, and their source images."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    image, patch, exists = row // patches, row % patches, row < rows
    return row, image, patch, exists, tl.load(source_ptr + row, mask=exists, other=0).to(tl.int64)


@triton.jit
def _gather_forward_kernel(
    x_ptr, source_ptr, out_ptr, sizes, CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    rows, patches, stride_image, stride_patch = sizes
    row, _, patch, exists, source = _rows(source_ptr, rows, patches, BLOCK_ROWS)
    x_row = x_ptr + source * stride_image + patch * stride_patch
    out_row = out_ptr + row * CHANNELS
    for first in tl.static_range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        mask = exists[:, None] & (channel < CHANNELS)
        x = tl.load(x_row[:, None] + channel, mask=mask)
        tl.store(out_row[:, None] + channel, x, mask=mask)


@triton.jit
def _blend_forward_kernel(
    mixed_ptr,
    original_ptr,
    source_ptr,
    out_ptr,
    alpha,
    sizes,
    strides,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    rows, patches = sizes
    mixed_stride_image, mixed_stride_patch, original_stride_image, original_stride_patch = strides
    row, image, patch, exists, source = _rows(source_ptr, rows, patches, BLOCK_ROWS)
    mixed_row = mixed_ptr + image * mixed_stride_image + patch * mixed_stride_patch
    original_row = original_ptr + source * original_stride_image + patch * original_stride_patch
    out_row = out_ptr + row * CHANNELS
    for first in tl.static_range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        mask = exists[:, None] & (channel < CHANNELS)
        mixed = tl.load(mixed_row[:, None] + channel, mask=mask).to(tl.float32)
        original = tl.load(original_row[:, None] + channel, mask=mask).to(tl.float32)
        out = mixed + alpha * (original - mixed)
        tl.store(out_row[:, None] + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _blend_backward_kernel(
    grad_ptr,
    source_ptr,
    grad_mixed_ptr,
    grad_original_ptr,
    alpha,
    sizes,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    rows, patches, stride_image, stride_patch = sizes
    row, image, patch, exists, source = _rows(source_ptr, rows, patches, BLOCK_ROWS)
    grad_row = grad_ptr + image * stride_image + patch * stride_patch
    grad_mixed_row = grad_mixed_ptr + row * CHANNELS
    # The source of a patch has no other reader, so its gradient has no other writer: one read, two writes.
    grad_original_row = grad_original_ptr + (source * patches + patch) * CHANNELS
    for first in tl.static_range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        mask = exists[:, None] & (channel < CHANNELS)
        grad = tl.load(grad_row[:, None] + channel, mask=mask).to(tl.float32)
        dtype = grad_mixed_ptr.dtype.element_ty
        tl.store(grad_mixed_row[:, None] + channel, ((1.0 - alpha) * grad).to(dtype), mask=mask)
        tl.store(grad_original_row[:, None] + channel, (alpha * grad).to(dtype), mask=mask)


@triton.jit
def _preceding(key, member, keys, first, group_size):
    """How many of the members first .. first + 3, which have `keys`, precede `member`: smaller key, ties by number."""
    count = ((keys[0] < key) | ((keys[0] == key) & (first < member))).to(tl.int32)
    for lane in tl.static_range(1, 4):
        precedes = (keys[lane] < key) | ((keys[lane] == key) & (first + lane < member))
        count += (precedes & (first + lane < group_size)).to(tl.int32)
    return count


@triton.jit(do_not_specialize=["first_group"])
def _sample_plan_kernel(
    seed_ptr, source_ptr, inverse_ptr, first_group, group_size, patches, BLOCK_PATCHES: tl.constexpr
):
    """Four members of a group at a block of patches: the rank of a member's random key is its place."""
    blocks, quads = tl.cdiv(patches, BLOCK_PATCHES), tl.cdiv(group_size, 4)
    program = tl.program_id(0)
    patch = program % blocks * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    quad = program // blocks % quads
    group = (program // (blocks * quads)).to(tl.int64)
    seed = tl.load(seed_ptr)
    number = group + first_group
    low, high = number.to(tl.int32), (number >> 32).to(tl.int32)
    keys = tl.philox(seed, patch, quad, low, high)
    zero = tl.zeros((BLOCK_PATCHES,), tl.int32)
    ranks = (zero, zero, zero, zero)
    for other in range(0, quads):
        others, counted = tl.philox(seed, patch, other, low, high), ()
        for lane in tl.static_range(4):
            before = _preceding(keys[lane], 4 * quad + lane, others, 4 * other, group_size)
            counted = counted + (ranks[lane] + before,)
        ranks = counted
    for lane in tl.static_range(4):
        member = 4 * quad + lane
        mask = (member < group_size) & (patch < patches)
        image, place = group * group_size + member, group * group_size + ranks[lane]
        tl.store(inverse_ptr + image * patches + patch, place.to(tl.int32), mask=mask)
        tl.store(source_ptr + place * patches + patch, image.to(tl.int32) + tl.zeros_like(zero), mask=mask)


@functools.cache
def _channel_block(channels: int) -> int:
    """The largest power of two up to 128 that divides `channels`, so that no lane is masked; 128 if it is below 32
    (384 -> 128, 100 -> 128)."""
    block = min(channels & -channels, 128)
    return block if block >= 32 else min(next_power_of_2(channels), 128)


def launch(kernel, arguments: tuple, out: Tensor, rows: int, groups: int | None = None, **constexprs: int) -> None:
    """Run `kernel` with the channels of `out` ``[..., C]``: a program for each block of `rows`, or with mixing `groups`
    for each block of rows and of channels of every group."""
    channels = out.shape[-1]
    block = _channel_block(channels)
    programs = 1 if groups is None else groups * cdiv(channels, block)

    def run(config: Config) -> None:
        grid = (programs * cdiv(rows, config.blocks["BLOCK_ROWS"]),)
        kernel[grid](*arguments, CHANNELS=channels, BLOCK_CHANNELS=block, **constexprs, **config.kwargs)

    if out.numel() > 0:
        tuned(kernel.fn.__name__.strip("_").removesuffix("_kernel"), run, out, CONFIGS, CANDIDATES, out.shape)


def gather_forward(x: Tensor, source: Tensor, inverse: Tensor, out: Tensor) -> None:
    """``out[b, n] = x[source[b, n], n]`` for ``x [B, N, C]``, int32 ``source [B, N]``; backward takes `inverse`."""
    x = with_unit_channel_stride(x)
    rows = source.numel()
    arguments = (x, source.contiguous(), out, (rows, x.shape[1], *x.stride()[:2]))
    launch(_gather_forward_kernel, arguments, out, rows)


def blend_forward(mixed: Tensor, original: Tensor, source: Tensor, alpha: float, out: Tensor) -> None:
    """``(1 - alpha) * mixed + alpha * original[source, n]``: each tensor read once, one written."""
    mixed, original = with_unit_channel_stride(mixed), with_unit_channel_stride(original)
    rows = source.numel()
    strides = (*mixed.stride()[:2], *original.stride()[:2])
    arguments = (mixed, original, source.contiguous(), out, alpha, (rows, mixed.shape[1]), strides)
    launch(_blend_forward_kernel, arguments, out, rows)


def blend_backward(grad: Tensor, source: Tensor, alpha: float, grad_mixed: Tensor, grad_original: Tensor) -> None:
    """Gradients of `mixed` and of `original`: `grad` read once, both written. `source` must be a bijection."""
    grad = with_unit_channel_stride(grad)
    rows = source.numel()
    sizes = (rows, grad.shape[1], *grad.stride()[:2])
    arguments = (grad, source.contiguous(), grad_mixed, grad_original, alpha, sizes)
    launch(_blend_backward_kernel, arguments, grad_mixed, rows)


def sample_plan(
    seed: Tensor, first_group: int, batch: int, patches: int, group_size: int, source: Tensor, inverse: Tensor
) -> None:
    """Draw `source` and `inverse` under the key `seed` (0-d int64, read on the device)."""
    programs = batch // group_size * cdiv(group_size, 4) * cdiv(patches, PLAN_BLOCK)
    if programs:
        _sample_plan_kernel[(programs,)](
            seed, source, inverse, first_group, group_size, patches, BLOCK_PATCHES=PLAN_BLOCK, num_warps=4
        )
