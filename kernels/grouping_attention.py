"""Grouping attention: hard Gumbel assignment of patches to groups, and the mean of each group's patches.

docs/kernels.md has the maths of forward and backward and the bytes that each kernel moves. A program owns a tile of
patches by all groups of one image. Logits, noise and softmax stay in registers; backward computes them again. Forward
keeps the winning group of each patch (two bytes) and each group's total.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grouping_tiles as tiles
from .grouping_problem import CANDIDATES, Problem, prefetch_bytes, rows_together, strides
from .philox import gumbel_noise
from .precision import LOG2_E, operand, reciprocal
from .settings import Grouping
from .variants import Config, cdiv, tuned

_ONCE: tl.constexpr = tl.constexpr("evict_first")  # cache policy of tensors that are read once, which leaves room for k


@triton.jit(do_not_specialize=["first_image"])
def _grouping_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seed_ptr,
    out_ptr,
    total_ptr,
    winner_ptr,
    soft_ptr,
    used_ptr,
    first_image: tl.int64,
    numbers,
    strides,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Assign one tile of patches, and where that is the whole image, aggregate it too.

    Pointers may be None: seed_ptr (no noise), winner_ptr (soft assignment), soft_ptr and used_ptr (maps not wanted).
    PREFETCH is the size in bytes of the rows of v that L2 fetches while the noise is drawn, or 0.
    """
    patches, scale, inverse_tau, eps = numbers
    q_stride_image, q_stride_group, k_stride_image, k_stride_patch, v_stride_image, v_stride_patch = strides
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    patch_exists = patch < patches
    group = tiles.group_of_column(BLOCK_GROUPS)
    group_exists = group < GROUPS
    q_rows = (q_ptr + image * q_stride_image, group * q_stride_group, group_exists)
    k_rows = (k_ptr + image * k_stride_image, patch * k_stride_patch, patch_exists)
    v_rows = (v_ptr + image * v_stride_image, patch * v_stride_patch, patch_exists)
    map_start = image * GROUPS * patches

    zero = tl.zeros((BLOCK_PATCHES, BLOCK_GROUPS), tl.float32)
    logits = tiles.inner_products(zero, k_rows, q_rows, CHANNELS, BLOCK_CHANNELS)
    if PREFETCH:
        tiles.prefetch_rows(v_rows, PREFETCH)
    logits *= scale * inverse_tau * LOG2_E
    noisy = logits
    if seed_ptr is not None:
        noisy += gumbel_noise(tl.load(seed_ptr), first_image + image, patch, inverse_tau, BLOCK_GROUPS // 4)
    noisy = tiles.mask_groups(noisy, group, GROUPS)
    if winner_ptr is not None:
        winner = tiles.winners(noisy, group)
        tl.store(winner_ptr + image * patches + patch, winner.to(tl.int16), mask=patch_exists)
        used, total = tiles.one_hot(tl.where(patch_exists, winner, -1), group)
    else:
        used = tl.where(patch_exists[:, None], tiles.softmax(noisy), 0.0)
        total = tl.sum(used, axis=0)
    if soft_ptr is not None:
        soft = tiles.softmax(tiles.mask_groups(logits, group, GROUPS))
        tiles.store_map(soft_ptr + map_start, patch, group, soft, patches, GROUPS)
    if used_ptr is not None:
        tiles.store_map(used_ptr + map_start, patch, group, used, patches, GROUPS)
    if ONE_TILE:
        tl.store(total_ptr + image * GROUPS + group, total, mask=group_exists)
        out_ptr += image * GROUPS * CHANNELS
        weights = operand(used, v_ptr.dtype.element_ty)
        inverse_total = reciprocal(total + eps)
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            v = tiles.load_rows(v_rows, first, CHANNELS, BLOCK_CHANNELS, _ONCE)
            out = tiles.weighted_sums(weights, v) * inverse_total[:, None]
            tiles.store_rows((out_ptr, group * CHANNELS, group_exists), first, out, CHANNELS, BLOCK_CHANNELS)


@triton.jit
def _aggregate_kernel(
    winner_ptr,
    map_ptr,
    x_ptr,
    out_ptr,
    total_ptr,
    patches,
    scale,
    eps,
    x_strides,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``out[b, g] = factor[b, g] * sum over patches of map[b, g, n] * x[b, n]`` for images of several tiles.

    The map is the one-hot of `winner` if there is one, else `map`. The factor is ``1 / (sum of the map + eps)`` where
    totals are kept, else `scale`.
    """
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_CHANNELS
    group = tl.arange(0, BLOCK_GROUPS)
    group_exists = group < GROUPS
    x_ptr += image * x_strides[0]
    out = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS), tl.float32)
    totals = tl.zeros((BLOCK_GROUPS,), tl.float32)
    for first_patch in range(0, patches, BLOCK_PATCHES):
        patch = first_patch + tl.arange(0, BLOCK_PATCHES)
        patch_exists = patch < patches
        x = tiles.load_rows((x_ptr, patch * x_strides[1], patch_exists), first, CHANNELS, BLOCK_CHANNELS)
        if winner_ptr is not None:
            winner = tl.load(winner_ptr + image * patches + patch, mask=patch_exists, other=0).to(tl.int32)
            weights, total = tiles.one_hot(tl.where(patch_exists, winner, -1), group)
        else:
            weights = tiles.load_map(map_ptr + image * GROUPS * patches, patch, group, patches, GROUPS)
            total = tl.sum(weights.to(tl.float32), axis=0)
        totals += total
        out += tiles.weighted_sums(operand(weights, x_ptr.dtype.element_ty), x)
    if total_ptr is not None:
        # every program of the image writes the same numbers
        tl.store(total_ptr + image * GROUPS + group, totals, mask=group_exists)
        out = out * reciprocal(totals + eps)[:, None]
    else:
        out = out * scale
    out_rows = (out_ptr + image * GROUPS * CHANNELS, group * CHANNELS, group_exists)
    tiles.store_rows(out_rows, first, out, CHANNELS, BLOCK_CHANNELS)


@triton.jit(do_not_specialize=["first_image"])
def _grouping_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seed_ptr,
    out_ptr,
    total_ptr,
    winner_ptr,
    grad_out_ptr,
    grad_soft_ptr,
    grad_used_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_logits_ptr,
    first_image: tl.int64,
    numbers,
    strides,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Gradients of one tile of patches; that of q too where the tile is the whole image, else of the logits.

    Pointers may be None: seed_ptr, winner_ptr (soft assignment), grad_soft_ptr and grad_used_ptr (no such gradient);
    with one tile grad_logits_ptr, with several grad_q_ptr; out_ptr if there is one tile and no grad_used.
    PREFETCH is the size in bytes of the rows of v and grad_out that L2 fetches while the noise is drawn, or 0.
    """
    patches, scale, inverse_tau, eps = numbers
    q_stride_image, q_stride_group, k_stride_image, k_stride_patch = strides[:4]
    v_stride_image, v_stride_patch, grad_stride_image, grad_stride_group = strides[4:]
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    patch_exists = patch < patches
    group = tiles.group_of_column(BLOCK_GROUPS)
    group_exists = group < GROUPS
    q_rows = (q_ptr + image * q_stride_image, group * q_stride_group, group_exists)
    k_rows = (k_ptr + image * k_stride_image, patch * k_stride_patch, patch_exists)
    v_rows = (v_ptr + image * v_stride_image, patch * v_stride_patch, patch_exists)
    grad_rows = (grad_out_ptr + image * grad_stride_image, group * grad_stride_group, group_exists)
    grad_k_ptr += image * patches * CHANNELS
    grad_v_ptr += image * patches * CHANNELS
    map_start = image * GROUPS * patches

    zero = tl.zeros((BLOCK_PATCHES, BLOCK_GROUPS), tl.float32)
    logits = tiles.inner_products(zero, k_rows, q_rows, CHANNELS, BLOCK_CHANNELS)
    if PREFETCH:
        tiles.prefetch_rows(grad_rows, PREFETCH)
        tiles.prefetch_rows(v_rows, PREFETCH)
    logits *= scale * inverse_tau * LOG2_E
    if grad_soft_ptr is not None:
        soft = tiles.softmax(tiles.mask_groups(logits, group, GROUPS))
    if seed_ptr is not None:
        logits += gumbel_noise(tl.load(seed_ptr), first_image + image, patch, inverse_tau, BLOCK_GROUPS // 4)
    probability = tiles.softmax(tiles.mask_groups(logits, group, GROUPS))

    # Gradient of the assignment: through the weighted mean (its total contributes -mean), and of the returned map
    total = tl.load(total_ptr + image * GROUPS + group, mask=group_exists, other=1.0) + eps
    inverse_total = reciprocal(total)
    products = zero
    if grad_used_ptr is not None:
        products = tiles.load_map(grad_used_ptr + map_start, patch, group, patches, GROUPS) * total[None, :]
    products = tiles.inner_products(products, v_rows, grad_rows, CHANNELS, BLOCK_CHANNELS, _ONCE)
    if winner_ptr is not None:
        winner = tl.load(winner_ptr + image * patches + patch, mask=patch_exists, other=0).to(tl.int32)
    if out_ptr is not None:
        out_ptr += image * GROUPS * CHANNELS
        mean = tl.zeros((BLOCK_GROUPS,), tl.float32)
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            grad = tiles.load_rows(grad_rows, first, CHANNELS, BLOCK_CHANNELS).to(tl.float32)
            out_rows = (out_ptr, group * CHANNELS, group_exists)
            out = tiles.load_rows(out_rows, first, CHANNELS, BLOCK_CHANNELS).to(tl.float32)
            mean += tl.sum(grad * out, axis=1)
    elif winner_ptr is not None:
        mean = tl.sum(tl.where(winner[:, None] == group[None, :], products, 0.0), axis=0) * inverse_total
    else:
        mean = tl.sum(probability * products, axis=0) * inverse_total
    # Straight-through: passed on to the softmax, whose argument was divided by tau.
    factor = inverse_total * inverse_tau
    grad_used = products * factor[None, :] - (mean * factor)[None, :]
    grad_logits = probability * (grad_used - tl.sum(probability * grad_used, axis=1)[:, None])
    if grad_soft_ptr is not None:
        grad_soft = inverse_tau * tiles.load_map(grad_soft_ptr + map_start, patch, group, patches, GROUPS)
        grad_logits += soft * (grad_soft - tl.sum(soft * grad_soft, axis=1)[:, None])
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    grad_logits = operand(grad_logits, dtype)
    for first in range(0, CHANNELS, BLOCK_CHANNELS):
        q = tiles.load_rows(q_rows, first, CHANNELS, BLOCK_CHANNELS)
        grad_k = tl.dot(grad_logits, q, input_precision="ieee") * scale
        tiles.store_rows((grad_k_ptr, patch * CHANNELS, patch_exists), first, grad_k, CHANNELS, BLOCK_CHANNELS)
        if ONE_TILE:
            k = tiles.load_rows(k_rows, first, CHANNELS, BLOCK_CHANNELS)
            grad_q = tiles.weighted_sums(grad_logits, k) * scale
            grad_q_rows = (grad_q_ptr + image * GROUPS * CHANNELS, group * CHANNELS, group_exists)
            tiles.store_rows(grad_q_rows, first, grad_q, CHANNELS, BLOCK_CHANNELS)
    if winner_ptr is not None:
        # A row of the one-hot picks a row of grad_out exactly; the division by the group's total follows the matmul, in
        # fp32. Adding 0 makes the compiler build the one-hot in the registers where the matmul reads it.
        weights = (winner[:, None] == group[None, :]).to(grad_logits.dtype) + (grad_logits - grad_logits)
        # the winner of a patch with a NaN is no group
        winner_total = tl.load(total_ptr + image * GROUPS + winner, mask=winner < GROUPS, other=float("nan"))
        row_factor = reciprocal(winner_total + eps)
    else:
        weights = operand(probability * inverse_total[None, :], dtype)
        row_factor = tl.full((BLOCK_PATCHES,), 1.0, tl.float32)
    for first in range(0, CHANNELS, BLOCK_CHANNELS):
        grad = tiles.load_rows(grad_rows, first, CHANNELS, BLOCK_CHANNELS)
        grad_v = tl.dot(weights, grad, input_precision="ieee") * row_factor[:, None]
        tiles.store_rows((grad_v_ptr, patch * CHANNELS, patch_exists), first, grad_v, CHANNELS, BLOCK_CHANNELS)
    if not ONE_TILE:
        tiles.store_map(grad_logits_ptr + map_start, patch, group, grad_logits, patches, GROUPS)


def _aggregate(
    problem: Problem,
    winner: Tensor | None,
    weights: Tensor | None,
    x: Tensor,
    out: Tensor,
    total: Tensor | None,
    settings: Grouping,
) -> None:
    arguments = (winner, weights, x, out, total, problem.patches, settings.scale, settings.eps, strides(x))

    def launch(config: Config) -> None:
        grid = (problem.batch, cdiv(problem.channels, config.blocks["BLOCK_CHANNELS"]))
        _aggregate_kernel[grid](*arguments, **problem.constexprs, **config.kwargs)

    table = problem.configurations("aggregate")
    tuned("grouping_aggregate", launch, x, table, CANDIDATES, (problem, winner is None))


def grouping_forward(*arguments: Any) -> None:
    """Fill the output ``[B, G, C]``, the assignment ``[B, G, N]`` if asked for, and what backward needs: the winner of
    each patch ``[B, N]`` if hard, and each group's total ``[B, G]``.

    `seed`: 0-d int64 tensor on the device, or None for no noise. At most 128 groups. Inputs of one dtype.
    """
    q, k, v, seed, settings, out, assignment, winner, total = arguments
    q, k, v = rows_together(q), rows_together(k), rows_together(v)
    if out.numel() == 0:
        return
    hard, returned = settings.hard, settings.return_assignment
    problem = Problem.of(q, k, with_soft=returned == "soft" or not hard)
    batch, groups, patches = problem.batch, problem.groups, problem.patches
    one_tile = problem.tiles == 1
    soft, used = (assignment if returned == kind else None for kind in ("soft", "used"))
    if used is None and not hard and not one_tile:
        used = torch.empty((batch, groups, patches), dtype=torch.float32, device=q.device)
    winner_or_none = winner if hard else None
    arguments = (q, k, v, seed, out, total, winner_or_none, soft, used, *problem.numbers(settings), strides(q, k, v))
    constexprs = {**problem.constexprs, "ONE_TILE": one_tile, "PREFETCH": prefetch_bytes(v) * one_tile}

    def launch(config: Config) -> None:
        _grouping_forward_kernel[batch, problem.tiles](*arguments, **constexprs, **config.kwargs)

    key = (problem, hard, seed is None, returned)
    tuned("grouping_forward", launch, q, problem.configurations("forward"), CANDIDATES, key)
    if not one_tile:
        _aggregate(problem, winner_or_none, used, v, out, total, settings)


def grouping_backward(*arguments: Any) -> None:
    """Fill the gradients of q, k and v, which come last, from the inputs and outputs of :func:`grouping_forward`."""
    grad_out, grad_assignment, q, k, v, seed, out, winner, total, settings, grad_q, grad_k, grad_v = arguments
    if grad_q.numel() == 0:
        grad_k.zero_()
        grad_v.zero_()
        return
    q, k, v, grad_out = (rows_together(x) for x in (q, k, v, grad_out))
    hard, returned = settings.hard, settings.return_assignment
    problem = Problem.of(q, k, with_soft=(grad_assignment is not None and returned == "soft") or not hard)
    batch, groups, patches = problem.batch, problem.groups, problem.patches
    one_tile = problem.tiles == 1
    grad_logits = None if one_tile else torch.empty((batch, groups, patches), dtype=k.dtype, device=q.device)
    if grad_assignment is not None:
        grad_assignment = grad_assignment.contiguous()
    grad_soft, grad_used = (grad_assignment if returned == kind else None for kind in ("soft", "used"))
    out_or_none = None if one_tile and grad_used is None else out
    arguments = (q, k, v, seed, out_or_none, total, winner if hard else None, grad_out, grad_soft, grad_used)
    arguments += (grad_q if one_tile else None, grad_k, grad_v, grad_logits)
    arguments += (*problem.numbers(settings), strides(q, k, v, grad_out))
    constexprs = {**problem.constexprs, "ONE_TILE": one_tile, "PREFETCH": prefetch_bytes(v, grad_out)}

    def launch(config: Config) -> None:
        _grouping_backward_kernel[batch, problem.tiles](*arguments, **constexprs, **config.kwargs)

    key = (problem, hard, seed is None, returned)
    table = problem.configurations("backward" if grad_assignment is None else "backward with map")
    tuned("grouping_backward", launch, q, table, CANDIDATES, key)
    if not one_tile:
        _aggregate(problem, None, grad_logits, k, grad_q, None, settings)
