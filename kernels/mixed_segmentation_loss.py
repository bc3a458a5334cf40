"""The segmentation loss of mixed images: forward and backward each read `first` once.

For image b of a mixing group with the texts t_0..t_{K-1} (derived in docs/losses.md):

    cosines[k, g2]  = t_k · segments[g2]
    scores[k, g1]   = scale Σ_g2 cosines[k, g2] second[g2, g1]
    logits[k, n]    = Σ_g1 scores[k, g1] first[g1, n]

A small kernel computes the scores of each image. A program then holds a few patches of an image by all G1 groups in
registers and computes the K logits of each patch as plain sums of products in fp32. Backward stores the gradient of the
scores in one part per program; further small kernels add the parts and compute the other gradients. Their matmuls are
fp32-accurate for inputs of any dtype (three tf32 products each).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import rounded
from .variants import Config, cdiv, next_power_of_2, tuned

# By the most logits that a power of two of groups and COUNT texts have between them, then by architecture.
CONFIGS = {
    2**8: {80: Config({"BLOCK_N": 32}, num_warps=1)},
    2**9: {80: Config({"BLOCK_N": 32}, num_warps=2)},
    2**10: {80: Config({"BLOCK_N": 32}, num_warps=4)},
}
CANDIDATES = [Config({"BLOCK_N": block}, num_warps=warps) for block in (16, 32, 64, 128) for warps in (1, 2, 4)]
MOST_TEXTS = 8  # at a time


@triton.jit
def _load(pointer, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a contiguous [ROWS, COLUMNS] matrix in fp32, zero outside."""
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(pointer + row[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, column, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    value = rounded(value, pointer.dtype.element_ty)
    tl.store(pointer + row[:, None] * COLUMNS + column[None, :], value, mask=inside)


@triton.jit
def _cosine(segments_ptr, text_ptr, g2, G2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """segments · text, [G2]."""
    products = tl.zeros([g2.shape[0], BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        text = tl.load(text_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        products += _load(segments_ptr, g2, d, G2, D) * text[None, :]
    return tl.sum(products, 1)


@triton.jit
def _mixed_segmentation_scores_kernel(
    second_ptr,
    segments_ptr,
    texts_ptr,
    scale_ptr,
    cosines_ptr,
    scores_ptr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cosines [K, G2] and scores [K, G1] of an image."""
    image = tl.program_id(0).to(tl.int64)
    g1, g2 = tl.arange(0, triton.next_power_of_2(G1)), tl.arange(0, triton.next_power_of_2(G2))
    second = _load(second_ptr + image * G2 * G1, g2, g1, G2, G1)
    segments_ptr += image * G2 * D
    texts_ptr += image // K * K * D  # of the mixing group
    scale = tl.load(scale_ptr)
    for start in range(0, K, COUNT):
        cosines = ()
        for k in tl.static_range(COUNT):
            cosines = cosines + (_cosine(segments_ptr, texts_ptr + (start + k) * D, g2, G2, D, BLOCK_D),)
        for k in tl.static_range(COUNT):
            row = image * K + start + k
            tl.store(cosines_ptr + row * G2 + g2, cosines[k], mask=g2 < G2)
            scores = tl.sum(second * (cosines[k] * scale)[:, None], 0)
            tl.store(scores_ptr + row * G1 + g1, scores, mask=g1 < G1)


@triton.jit
def _block(first_ptr, source_ptr, N: tl.constexpr, G1: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's image, its number among the image's programs, groups, patches, map of patches to groups, and
    labels. Programs of one image are adjacent, because they share sectors of memory."""
    parts: tl.constexpr = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    part, image = program % parts, (program // parts).to(tl.int64)
    n, g1 = part * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, triton.next_power_of_2(G1))
    first = _load(first_ptr + image * G1 * N, g1, n, G1, N)
    label = tl.load(source_ptr + image * N + n, mask=n < N, other=0) % K
    return image, part, g1, n, first, label


@triton.jit
def _score(scores_ptr, g1, k, G1: tl.constexpr):
    return tl.load(scores_ptr + k * G1 + g1, mask=g1 < G1, other=0.0)


@triton.jit
def _logits(first, scores_ptr, g1, start, G1: tl.constexpr, COUNT: tl.constexpr):
    """The logits [N] of each of the texts ``start`` to ``start + COUNT``."""
    logits = ()
    for k in tl.static_range(COUNT):
        logits = logits + (tl.sum(first * _score(scores_ptr, g1, start + k, G1)[:, None], 0),)
    return logits


@triton.jit
def _exponentials(logits, largest, total, COUNT: tl.constexpr):
    """The largest logit [N], and the sum of all exponentials relative to it, with `logits` added to both."""
    before = largest
    for k in tl.static_range(COUNT):
        largest = tl.maximum(largest, logits[k])
    total *= tl.exp(before - largest)
    for k in tl.static_range(COUNT):
        total += tl.exp(logits[k] - largest)
    return largest, total


@triton.jit
def _mixed_segmentation_forward_kernel(
    first_ptr,
    scores_ptr,
    source_ptr,
    loss_ptr,
    correct_ptr,
    N: tl.constexpr,
    G1: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, part, g1, n, first, label = _block(first_ptr, source_ptr, N, G1, K, BLOCK_N)
    scores_ptr += image * K * G1
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total, own = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    winner = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, K, COUNT):
        logits = _logits(first, scores_ptr, g1, start, G1, COUNT)
        leading = largest
        for k in tl.static_range(COUNT):
            own = tl.where(label == start + k, logits[k], own)
            winner = tl.where(logits[k] > leading, start + k, winner)  # ties stay with the lowest
            leading = tl.maximum(leading, logits[k])
        largest, total = _exponentials(logits, largest, total, COUNT)
    tl.store(loss_ptr + image * N + n, tl.log(total) - (own - largest), mask=n < N)
    tl.store(correct_ptr + image * N + n, winner == label, mask=n < N)


@triton.jit
def _mixed_segmentation_backward_kernel(
    grad_ptr,
    first_ptr,
    scores_ptr,
    source_ptr,
    grad_first_ptr,
    grad_scores_ptr,
    grad_strides,
    N: tl.constexpr,
    G1: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of first [G1, BLOCK_N], and this program's part of the gradient of the scores, of [K, parts, G1]."""
    image, part, g1, n, first, label = _block(first_ptr, source_ptr, N, G1, K, BLOCK_N)
    scores_ptr += image * K * G1
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, COUNT):
        largest, total = _exponentials(_logits(first, scores_ptr, g1, start, G1, COUNT), largest, total, COUNT)
    grad = tl.load(grad_ptr + image * grad_strides[0] + n * grad_strides[1], mask=n < N, other=0.0)
    share = grad / total
    grad_first = tl.zeros_like(first)
    parts: tl.constexpr = tl.cdiv(N, BLOCK_N)
    grad_scores_ptr += (image * K * parts + part) * G1
    for start in range(0, K, COUNT):
        logits = _logits(first, scores_ptr, g1, start, G1, COUNT)  # in registers already where K = COUNT
        for k in tl.static_range(COUNT):
            grad_logit = tl.exp(logits[k] - largest) * share - tl.where(label == start + k, grad, 0.0)
            grad_first += _score(scores_ptr, g1, start + k, G1)[:, None] * grad_logit[None, :]
            grad_score = tl.sum(first * grad_logit[None, :], 1)
            tl.store(grad_scores_ptr + (start + k) * parts * G1 + g1, grad_score, mask=g1 < G1)
    _store(grad_first_ptr + image * G1 * N, g1, n, grad_first, G1, N)


@triton.jit
def _mixed_segmentation_cosines_kernel(
    grad_scores_ptr,
    second_ptr,
    scale_ptr,
    cosines_ptr,
    grad_second_ptr,
    grad_cosines_ptr,
    grad_scale_ptr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The gradients of second and of the cosines [G2, K] of an image, and its part of the scale's gradient."""
    image = tl.program_id(0).to(tl.int64)
    g1, g2 = tl.arange(0, triton.next_power_of_2(G1)), tl.arange(0, triton.next_power_of_2(G2))
    second = _load(second_ptr + image * G2 * G1, g2, g1, G2, G1)
    scale = tl.load(scale_ptr)
    grad_second = tl.zeros_like(second)
    grad_scale = tl.zeros([g2.shape[0]], tl.float32)
    for start in range(0, K, COUNT):
        grad_scores = ()
        for k in tl.static_range(COUNT):
            parts_ptr = grad_scores_ptr + (image * K + start + k) * PARTS * G1
            parts = tl.zeros([BLOCK_PARTS, g1.shape[0]], tl.float32)
            for first in range(0, PARTS, BLOCK_PARTS):
                parts += _load(parts_ptr, first + tl.arange(0, BLOCK_PARTS), g1, PARTS, G1)
            grad_scores = grad_scores + (tl.sum(parts, 0),)
        for k in tl.static_range(COUNT):
            cosines = tl.load(cosines_ptr + (image * K + start + k) * G2 + g2, mask=g2 < G2, other=0.0)
            grad_second += (cosines * scale)[:, None] * grad_scores[k][None, :]
            grad_scaled = tl.sum(second * grad_scores[k][None, :], 1)  # of scale · cosines
            grad_scale += grad_scaled * cosines
            tl.store(grad_cosines_ptr + (image * G2 + g2) * K + start + k, grad_scaled * scale, mask=g2 < G2)
    _store(grad_second_ptr + image * G2 * G1, g2, g1, grad_second, G2, G1)
    tl.store(grad_scale_ptr + image, tl.sum(grad_scale))


@triton.jit
def _mixed_segmentation_embeddings_kernel(
    grad_cosines_ptr,
    segments_ptr,
    texts_ptr,
    grad_segments_ptr,
    grad_texts_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a mixing group with ROWS = K · G2 segments: grad_segments = grad_cosines [ROWS, K] @ texts [K, D] and
    grad_texts = grad_cosines.T @ segments."""
    group = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    texts = _load(texts_ptr + group * K * D, k, d, K, D)
    grad_texts = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        grad_cosines = _load(grad_cosines_ptr + group * ROWS * K, row, k, ROWS, K)
        segments = _load(segments_ptr + group * ROWS * D, row, d, ROWS, D)
        grad_texts += tl.dot(tl.trans(grad_cosines), segments, input_precision="tf32x3")
        grad_segments = tl.dot(grad_cosines, texts, input_precision="tf32x3")
        _store(grad_segments_ptr + group * ROWS * D, row, d, grad_segments, ROWS, D)
    _store(grad_texts_ptr + group * K * D, k, d, grad_texts, K, D)


class _Sizes(NamedTuple):
    """The constexprs of the kernels. Sizes are compiled in, so that rows of 196 patches load in vectors."""

    patches: dict[str, int]  # of the kernels over blocks of patches, which take COUNT texts at a time
    images: dict[str, int]  # of the kernels over images, with warps enough to hold `second` in registers
    scores: dict[str, int]  # those of the scores kernel
    embeddings: dict[str, int]  # of the embeddings kernel


@functools.cache
def _sizes(groups: int, second_groups: int, group_size: int, width: int) -> _Sizes:
    count = max(count for count in range(1, MOST_TEXTS + 1) if group_size % count == 0)
    block, second_block = next_power_of_2(groups), next_power_of_2(second_groups)
    warps = min(8, max(1, block * second_block * count // 2048))
    patches = {"G1": groups, "K": group_size, "COUNT": count}
    images = {**patches, "G2": second_groups, "num_warps": warps}
    scores = {**images, "D": width, "BLOCK_D": min(next_power_of_2(width), 2048 * warps // second_block)}
    rows = group_size * second_groups  # at least 16 on each side of a matmul
    block_rows, block_k, block_d = (max(16, next_power_of_2(size)) for size in (rows, group_size, width))
    blocks = {"BLOCK_ROWS": min(32, block_rows), "BLOCK_K": block_k, "BLOCK_D": min(64, block_d, 2048 // block_k)}
    return _Sizes(patches, images, scores, {"ROWS": rows, "K": group_size, "D": width, **blocks})


def _scores(second: Tensor, segments: Tensor, texts: Tensor, scale: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Cosines ``[B, K, G2]`` and scores ``[B, K, G1]``, fp32."""
    images, second_groups, groups = second.shape
    shapes = [(images, sizes.images["K"], size) for size in (second_groups, groups)]
    cosines, scores = (second.new_empty(shape, dtype=torch.float32) for shape in shapes)
    arguments = (second, segments, texts, scale, cosines, scores)
    _mixed_segmentation_scores_kernel[(images,)](*arguments, **sizes.scores)
    return cosines, scores


def _over_patches(name: str, launch: Callable[[Config, int], Any], first: Tensor, sizes: _Sizes) -> Any:
    """``launch(config, parts)``: `parts` is the number of blocks of an image's patches."""
    patches = first.shape[2]
    logits = next_power_of_2(sizes.patches["G1"]) * sizes.patches["COUNT"]
    table = CONFIGS[min(most for most in CONFIGS if most >= logits)]
    key = (first.shape, sizes.patches["K"])
    return tuned(name, lambda c: launch(c, cdiv(patches, c.blocks["BLOCK_N"])), first, table, CANDIDATES, key)


def mixed_segmentation_forward(*arguments: Any) -> None:
    """Fill the loss of each patch ``[B, N]``, and whether its largest logit is its image's ``[B, N]``.

    `scale` is 0-d fp32, `source` int32 ``[B, N]``. Tensors that are not contiguous are copied; the model's are.
    """
    first, second, segments, texts, source, scale, group_size, loss, correct = arguments
    first, second, segments, texts, source = (x.contiguous() for x in (first, second, segments, texts, source))
    images, groups, patches = first.shape
    sizes = _sizes(groups, second.shape[1], group_size, segments.shape[2])
    _, scores = _scores(second, segments, texts, scale, sizes)
    arguments = (first, scores, source, loss, correct)

    def launch(config: Config, parts: int) -> None:
        _mixed_segmentation_forward_kernel[(images * parts,)](*arguments, N=patches, **sizes.patches, **config.kwargs)

    _over_patches("mixed_segmentation_forward", launch, first, sizes)


def mixed_segmentation_backward(*arguments: Any) -> None:
    """Fill the gradients of first, second, segments, texts and the scale, which come last. The first argument is the
    gradient of each patch's loss, fp32 ``[B, N]`` of any strides."""
    grad, first, second, segments, texts, source, scale, group_size, *gradients = arguments
    first, second, segments, texts, source = (x.contiguous() for x in (first, second, segments, texts, source))
    images, second_groups, width = segments.shape
    _, groups, patches = first.shape
    sizes = _sizes(groups, second_groups, group_size, width)
    grad_first, grad_second, grad_segments, grad_texts, grad_scale = gradients
    cosines, scores = _scores(second, segments, texts, scale, sizes)

    def launch(config: Config, parts: int) -> Tensor:
        """The parts of the scores' gradient ``[B, K, parts, G1]``."""
        grad_scores = torch.empty((images, group_size, parts, groups), dtype=torch.float32, device=first.device)
        arguments = (grad, first, scores, source, grad_first, grad_scores, grad.stride())
        _mixed_segmentation_backward_kernel[(images * parts,)](*arguments, N=patches, **sizes.patches, **config.kwargs)
        return grad_scores

    grad_scores = _over_patches("mixed_segmentation_backward", launch, first, sizes)
    parts = grad_scores.shape[2]
    grad_cosines = torch.empty((images, second_groups, group_size), dtype=torch.float32, device=first.device)
    scale_parts = torch.empty(images, dtype=torch.float32, device=first.device)
    arguments = (grad_scores, second, scale, cosines, grad_second, grad_cosines, scale_parts)
    blocks = {"PARTS": parts, "BLOCK_PARTS": min(16, next_power_of_2(parts))}
    _mixed_segmentation_cosines_kernel[(images,)](*arguments, **sizes.images, **blocks)
    grid = (images // group_size, cdiv(width, sizes.embeddings["BLOCK_D"]))
    arguments = (grad_cosines, segments, texts, grad_segments, grad_texts)
    _mixed_segmentation_embeddings_kernel[grid](*arguments, **sizes.embeddings, num_warps=4)
    torch.sum(scale_parts, 0, out=grad_scale)
