"""The segmentation loss of mixed images: one program per image, forward and backward each read `first` once.

For image b of a mixing group with the texts t_0..t_{K-1} (docs/losses.md has the derivation):

    cosines[g2, k]  = segments[g2] · t_k
    scores[g1, k]   = scale Σ_g2 second[g2, g1] cosines[g2, k]
    logits[n, k]    = Σ_g1 first[g1, n] scores[g1, k]

Everything but `first` and its gradient is a few numbers per image and stays in registers; K is padded to 16, the
smallest side of a matrix product. Products are fp32-accurate whatever the inputs' dtype (three tf32 products each).
The one sum over images, the gradient of the texts, is a second small kernel over each group's images: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Config, cdiv, configuration, next_power_of_2, on_device

CONFIGS = {
    80: Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    90: Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    100: Config({"BLOCK_N": 32}, num_warps=4, num_stages=3),  # two spill 32 bytes at 784 patches in fp32
}
CANDIDATES = [
    Config({"BLOCK_N": block}, num_warps=warps, num_stages=stages)
    for block in (32, 64, 128)
    for warps in (2, 4, 8)
    for stages in (1, 2, 3)
]
MAX_FIRST_GROUPS, MAX_SECOND_GROUPS, MAX_GROUP_SIZE = 128, 64, 64  # what a program's registers hold


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _load(pointer, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a contiguous [ROWS, COLUMNS] matrix in fp32, zero outside."""
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(pointer + row[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, column, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(pointer + row[:, None] * COLUMNS + column[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _cosines(segments_ptr, texts_ptr, g2, k, G2: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cosines [G2, K], zero in the padding."""
    cosines = tl.zeros([g2.shape[0], k.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        cosines += _product(_load(segments_ptr, g2, d, G2, D), tl.trans(_load(texts_ptr, k, d, K, D)))
    return cosines


@triton.jit
def _softmax(logits, label, k, K: tl.constexpr):
    """Of logits [N, K]: the softmax over k, the loss of every patch [N], and where its label is."""
    logits = tl.where((k < K)[None, :], logits, float("-inf"))
    shifted = logits - tl.max(logits, 1)[:, None]
    exponentials = tl.exp(shifted)
    total = tl.sum(exponentials, 1)
    at_label = label[:, None] == k[None, :]
    loss = tl.log(total) - tl.sum(tl.where(at_label, shifted, 0.0), 1)
    return exponentials / total[:, None], loss, at_label


@triton.jit
def _mixed_segmentation_forward_kernel(
    first_ptr,
    second_ptr,
    segments_ptr,
    texts_ptr,
    source_ptr,
    scale_ptr,
    loss_ptr,
    N: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G1: tl.constexpr,
    BLOCK_G2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first_image = image // K * K  # of the mixing group
    g1, g2, k = tl.arange(0, BLOCK_G1), tl.arange(0, BLOCK_G2), tl.arange(0, BLOCK_K)
    cosines = _cosines(segments_ptr + image * G2 * D, texts_ptr + first_image * D, g2, k, G2, K, D, BLOCK_D)
    second = _load(second_ptr + image * G2 * G1, g2, g1, G2, G1)
    scores = _product(tl.trans(second), cosines * tl.load(scale_ptr))
    losses = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        label = tl.load(source_ptr + image * N + n, mask=n < N, other=0) - first_image.to(tl.int32)
        logits = _product(tl.trans(_load(first_ptr + image * G1 * N, g1, n, G1, N)), scores)
        _, loss, _ = _softmax(logits, label, k, K)
        losses += tl.where(n < N, loss, 0.0)
    tl.store(loss_ptr + image, tl.sum(losses) / N)


@triton.jit
def _mixed_segmentation_backward_kernel(
    grad_ptr,
    first_ptr,
    second_ptr,
    segments_ptr,
    texts_ptr,
    source_ptr,
    scale_ptr,
    grad_first_ptr,
    grad_second_ptr,
    grad_segments_ptr,
    grad_cosines_ptr,
    grad_scale_ptr,
    grad_stride,
    N: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G1: tl.constexpr,
    BLOCK_G2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first_image = image // K * K
    g1, g2, k = tl.arange(0, BLOCK_G1), tl.arange(0, BLOCK_G2), tl.arange(0, BLOCK_K)
    texts_ptr += first_image * D
    scale = tl.load(scale_ptr)
    cosines = _cosines(segments_ptr + image * G2 * D, texts_ptr, g2, k, G2, K, D, BLOCK_D)
    second = _load(second_ptr + image * G2 * G1, g2, g1, G2, G1)
    scores = _product(tl.trans(second), cosines * scale)  # [G1, K]

    per_patch = tl.load(grad_ptr + image * grad_stride) / N
    grad_scores = tl.zeros([BLOCK_G1, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        label = tl.load(source_ptr + image * N + n, mask=n < N, other=0) - first_image.to(tl.int32)
        first = _load(first_ptr + image * G1 * N, g1, n, G1, N)
        probabilities, _, at_label = _softmax(_product(tl.trans(first), scores), label, k, K)
        grad_logits = tl.where((n < N)[:, None], probabilities - tl.where(at_label, 1.0, 0.0), 0.0) * per_patch
        grad_scores += _product(first, grad_logits)
        _store(grad_first_ptr + image * G1 * N, g1, n, _product(scores, tl.trans(grad_logits)), G1, N)

    second = _load(second_ptr + image * G2 * G1, g2, g1, G2, G1)  # again: held through the loop it costs registers
    _store(grad_second_ptr + image * G2 * G1, g2, g1, _product(cosines * scale, tl.trans(grad_scores)), G2, G1)
    grad_scaled = _product(second, grad_scores)  # of scale · cosines
    tl.store(grad_scale_ptr + image, tl.sum(grad_scaled * cosines))
    grad_cosines = grad_scaled * scale
    _store(grad_cosines_ptr + image * G2 * K, g2, k, grad_cosines, G2, K)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad_segments = _product(grad_cosines, _load(texts_ptr, k, d, K, D))
        _store(grad_segments_ptr + image * G2 * D, g2, d, grad_segments, G2, D)


@triton.jit
def _mixed_segmentation_texts_kernel(
    grad_cosines_ptr,
    segments_ptr,
    grad_texts_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_texts[k] = Σ over the ROWS = K · G2 segments of the group's images of grad_cosines[·, k] segments[·]."""
    group = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_texts = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        grad_cosines = _load(grad_cosines_ptr + group * ROWS * K, row, k, ROWS, K)
        grad_texts += _product(tl.trans(grad_cosines), _load(segments_ptr + group * ROWS * D, row, d, ROWS, D))
    _store(grad_texts_ptr + group * K * D, k, d, grad_texts, K, D)


def _block(size: int) -> int:
    """The padded side of a matrix product."""
    return max(16, next_power_of_2(size))


def _shape(first: Tensor, second: Tensor, segments: Tensor, group_size: int) -> dict[str, int]:
    """The constexprs that the shapes give: sizes are compiled in, so that rows of 196 patches load in vectors."""
    groups, patches = first.shape[1:]
    second_groups, width = segments.shape[1:]
    return {
        "N": patches,
        "G1": groups,
        "G2": second_groups,
        "K": group_size,
        "D": width,
        "BLOCK_G1": _block(groups),
        "BLOCK_G2": _block(second_groups),
        "BLOCK_K": _block(group_size),
        "BLOCK_D": min(64, _block(width)),
    }


def _launch(name: str, kernel, arguments: tuple, first: Tensor, shape: dict[str, int]) -> None:
    """Run `kernel`, one program per image."""

    def launch(config: Config) -> None:
        kernel[(len(first),)](*arguments, **shape, **config.kwargs)

    key = (tuple(shape.values()), first.dtype)
    launch(configuration(name, CONFIGS, first.device, key, CANDIDATES, launch))


def mixed_segmentation_forward(
    first: Tensor, second: Tensor, segments: Tensor, texts: Tensor, source: Tensor, scale: Tensor, group_size: int
) -> Tensor:
    """The mean loss of each image, fp32 ``[B]``.

    `scale` is 0-d fp32, `source` int32 ``[B, N]``. Tensors that are not contiguous are copied; the model's are.
    """
    tensors = [x.contiguous() for x in (first, second, segments, texts, source)]
    loss = torch.empty(len(first), dtype=torch.float32, device=first.device)
    with on_device(first):
        shape = _shape(first, second, segments, group_size)
        _launch("mixed_segmentation_forward", _mixed_segmentation_forward_kernel, (*tensors, scale, loss), first, shape)
    return loss


def mixed_segmentation_backward(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    segments: Tensor,
    texts: Tensor,
    source: Tensor,
    scale: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of first, second, segments and texts in their dtypes, and of the scale (0-d fp32).

    `grad` fp32 ``[B]`` is the gradient of each image's loss.
    """
    images, second_groups, width = segments.shape
    tensors = [x.contiguous() for x in (first, second, segments, texts, source)]
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[:4]]
    grad_cosines = torch.empty(images, second_groups, group_size, dtype=torch.float32, device=first.device)
    grad_scale = torch.empty(images, dtype=torch.float32, device=first.device)
    arguments = (grad, *tensors, scale, *outputs[:3], grad_cosines, grad_scale, grad.stride(0))
    with on_device(first):
        shape = _shape(first, second, segments, group_size)
        _launch("mixed_segmentation_backward", _mixed_segmentation_backward_kernel, arguments, first, shape)
        rows, block = group_size * second_groups, shape["BLOCK_D"]
        _mixed_segmentation_texts_kernel[(images // group_size, cdiv(width, block))](
            grad_cosines,
            tensors[2],
            outputs[3],
            ROWS=rows,
            K=group_size,
            D=width,
            BLOCK_ROWS=min(32, _block(rows)),
            BLOCK_K=shape["BLOCK_K"],
            BLOCK_D=block,
            num_warps=4,
        )
    return *outputs, grad_scale.sum()
