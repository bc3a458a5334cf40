"""Segment decoding: soft maps of segments to pixel labels, in one pass that writes nothing but labels.

A pixel's class depends on the pixel only through its segment. So a small first launch finds the class of every segment.
The pixel kernel upsamples the maps bilinearly, keeps the largest value and its segment's label in registers, and stores
the label.

A block of pixel rows not taller than the upsampling factor touches at most three rows of a map. Those three are
interpolated along x once for the whole block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Config, cdiv, tuned

MAX_ROWS = 16  # pixel rows in a block: registers hold a best value and a label for each
# On sm_120 four warps spill.
CONFIGS = {80: Config({"BLOCK_X": 128}, num_warps=4), 120: Config({"BLOCK_X": 128}, num_warps=8)}
CANDIDATES = [Config({"BLOCK_X": size}, num_warps=warps) for size in (64, 128, 256) for warps in (2, 4, 8)]
CLASS_BLOCK = 256


@triton.jit
def _segment_label_kernel(
    score_ptr, threshold_ptr, label_ptr, groups, classes, strides, BACKGROUND: tl.constexpr, BLOCK_CLASSES: tl.constexpr
):
    """The best class of each segment. With BACKGROUND, class t is stored as t + 1, and 0 if its score is below the
    image's threshold."""
    segment = tl.program_id(0).to(tl.int64)
    image = segment // groups
    scores = score_ptr + image * strides[0] + (segment % groups) * strides[1]
    best = tl.full((), float("-inf"), tl.float32)
    label = tl.full((), 0, tl.int32)
    for first in range(0, classes, BLOCK_CLASSES):
        index = first + tl.arange(0, BLOCK_CLASSES)
        score = tl.load(scores + index.to(tl.int64) * strides[2], mask=index < classes, other=float("-inf"))
        block_best, block_label = tl.max(score.to(tl.float32), axis=0, return_indices=True)
        label = tl.where(block_best > best, first + block_label, label)
        best = tl.maximum(best, block_best)
    if BACKGROUND:
        label = tl.where(best < tl.load(threshold_ptr + image), 0, label + 1)
    tl.store(label_ptr + segment, label)


@triton.jit
def _source(index, scale, size):
    """PyTorch's bilinear sampling (align_corners=False): the two cells a pixel lies between, the weight of each."""
    position = tl.maximum(scale * (index.to(tl.float32) + 0.5) - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    weight = position - low.to(tl.float32)
    return low, tl.minimum(low + 1, size - 1), 1.0 - weight, weight


@triton.jit
def _row_of_map(row_ptr, left, right, left_weight, right_weight, stride_x, exists):
    """One row of a map, interpolated along x at the pixels of this block."""
    a = tl.load(row_ptr + left * stride_x, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(row_ptr + right * stride_x, mask=exists, other=0.0).to(tl.float32)
    return left_weight * a + right_weight * b


@triton.jit
def _decode_kernel(
    maps_ptr, labels_ptr, out_ptr, sizes, strides, GROUPS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr
):
    map_height, map_width, height, width, scale_y, scale_x = sizes
    stride_image, stride_group, stride_y, stride_x = strides
    blocks_x, blocks_y = tl.cdiv(width, BLOCK_X), tl.cdiv(height, BLOCK_Y)
    block = tl.program_id(0)
    image = (block // (blocks_x * blocks_y)).to(tl.int64)
    x = block % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    y = block // blocks_x % blocks_y * BLOCK_Y + tl.arange(0, BLOCK_Y)

    left, right, left_weight, right_weight = _source(x, scale_x, map_width)
    above, _, above_weight, below_weight = _source(y, scale_y, map_height)
    top, _, _, _ = _source(block // blocks_x % blocks_y * BLOCK_Y, scale_y, map_height)
    # With BLOCK_Y <= height / map_height, `above` is `top` or the row after it: each pixel row is a weighted sum of the
    # same three rows of the map, one weight being 0.
    starts_at_top = above == top
    first_weight = tl.where(starts_at_top, above_weight, 0.0)[:, None]
    second_weight = tl.where(starts_at_top, below_weight, above_weight)[:, None]
    third_weight = tl.where(starts_at_top, 0.0, below_weight)[:, None]
    middle, bottom = tl.minimum(top + 1, map_height - 1), tl.minimum(top + 2, map_height - 1)

    maps = maps_ptr + image * stride_image
    labels = labels_ptr + image * GROUPS
    best = tl.full((BLOCK_Y, BLOCK_X), float("-inf"), tl.float32)
    label = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32) + tl.load(labels)
    for group in range(GROUPS):
        group_map = maps + group * stride_group
        first = _row_of_map(group_map + top * stride_y, left, right, left_weight, right_weight, stride_x, x < width)
        second = _row_of_map(group_map + middle * stride_y, left, right, left_weight, right_weight, stride_x, x < width)
        third = _row_of_map(group_map + bottom * stride_y, left, right, left_weight, right_weight, stride_x, x < width)
        value = first_weight * first[None, :] + second_weight * second[None, :] + third_weight * third[None, :]
        better = value > best  # ties stay with the lowest group
        best = tl.where(better, value, best)
        label = tl.where(better, tl.load(labels + group), label)

    out = out_ptr + (image * height + y[:, None]) * width + x
    tl.store(out, label.to(tl.int64), mask=(y < height)[:, None] & (x < width))


def decode_forward(
    assignment: Tensor, scores: Tensor, threshold: Tensor | None, height: int, width: int, out: Tensor
) -> None:
    """Labels `out` from maps ``[B, G, h, w]``, class scores ``[B, G, T]`` and a threshold ``[B]``, read in place."""
    batch, groups, map_height, map_width = assignment.shape
    if out.numel() == 0:
        return
    labels = torch.empty((batch, groups), dtype=torch.int32, device=out.device)
    thresholds = scores if threshold is None else threshold.contiguous()
    arguments = (scores, thresholds, labels, groups, scores.shape[2], scores.stride())
    constexprs = {"BACKGROUND": threshold is not None, "BLOCK_CLASSES": CLASS_BLOCK}
    _segment_label_kernel[(batch * groups,)](*arguments, **constexprs, num_warps=1)
    # The tallest block of pixel rows, a power of two, that lies between three rows of a map
    block_y = 1 << (max(1, min(MAX_ROWS, height // map_height)).bit_length() - 1)
    sizes = (map_height, map_width, height, width, map_height / height, map_width / width)

    def launch(config: Config) -> None:
        blocks = cdiv(width, config.blocks["BLOCK_X"]) * cdiv(height, block_y)
        _decode_kernel[(batch * blocks,)](
            assignment, labels, out, sizes, assignment.stride(), GROUPS=groups, BLOCK_Y=block_y, **config.kwargs
        )

    tuned("decode_forward", launch, assignment, CONFIGS, CANDIDATES, (assignment.shape, height, width))
