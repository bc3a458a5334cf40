"""Contrastive loss: log-sum-exps over rows and columns of ``scale * rows @ columns.T``, and the gradient from them.

The matrix of logits is never stored. Both kernels are matmuls over [BLOCK_M, BLOCK_N] tiles. Their epilogue reduces
the tile to one log-sum-exp per row and per column (forward) or turns it into gradient weights (backward), which plain
matmuls multiply with the features. The rows are processed in strips: one launch writes the tiles' log-sum-exps, or a
strip of weights in the inputs' dtype, within a fixed budget of bytes at any batch (docs/losses.md counts).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import LOG2_E, exp2, rounded, upcast
from .settings import LogitBlock
from .variants import Config, cdiv, tuned, with_unit_channel_stride

# Per architecture for 16-bit operands (tensor cores) and for fp32 ones (IEEE products on the plain units).
CONFIGS_16 = {
    80: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32}, num_warps=8, num_stages=3),
    90: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3, most_registers=128),
    100: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3),
}
CONFIGS_MASKED = {80: CONFIGS_16[80]}  # masked loads of 64 features take too many registers
CONFIGS_32 = {  # where there is a limit, ptxas would take 80 registers without it, and spill
    architecture: Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, num_warps=8, most_registers=limit)
    for architecture, limit in ((80, None), (86, 128), (90, None), (100, 128))
}
CANDIDATES_16 = [
    Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, num_warps=warps, num_stages=stages)
    for m, n, warps in ((128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (64, 128, 4))
    for d in (32, 64)
    for stages in (2, 3, 4)
]
CANDIDATES_32 = [
    Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": 16}, num_warps=warps, num_stages=stages)
    for m, n in ((32, 64), (64, 64), (64, 128))
    for warps in (4, 8)
    for stages in (2, 3)
]
MERGE_BLOCK = {"BLOCK_N": 128, "BLOCK_PARTS": 16}

PARTIALS_BYTES = 2**24  # the tiles' log-sum-exps of one strip
STRIP_BYTES = 2**26  # the weights of one strip
SMALLEST_TOTAL = tl.constexpr(2.0**-64)  # a sum above it is accurate: a term flushed to 0 was below 2**-126


@triton.jit
def _tile(
    rows_ptr, columns_ptr, sizes, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """This program's rows [BLOCK_M], columns [BLOCK_N] and their products [BLOCK_M, BLOCK_N] in fp32.

    Rows vary fastest over the programs: concurrent programs share a block of columns and a strip of rows in L2.
    `sizes`: as of :func:`_tiles`.
    """
    rows, columns, row_stride, column_stride = sizes
    blocks = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    row = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    # Rows and columns beyond the last repeat it, so the loop needs no masks.
    row_ptr = rows_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * row_stride + d[None, :]
    column_ptr = columns_ptr + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * column_stride + d[None, :]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(row_ptr + start)
            b = tl.load(column_ptr + start)
        else:
            a = tl.load(row_ptr + start, mask=(start + d < D)[None, :], other=0.0)
            b = tl.load(column_ptr + start, mask=(start + d < D)[None, :], other=0.0)
        products = tl.dot(upcast(a), tl.trans(upcast(b)), products, input_precision="ieee")
    return row, column, products


@triton.jit
def _log_sum_exp(logits, axis: tl.constexpr):
    """The log-sum-exp along `axis`, to base 2."""
    largest = tl.max(logits, axis, keep_dims=True)
    total = tl.sum(exp2(logits - largest), axis, keep_dims=True)
    return tl.reshape(largest + tl.log2(total), (logits.shape[1 - axis],))


@triton.jit
def _log_sum_exp_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    row_parts_ptr,
    column_parts_ptr,
    sizes,
    D: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """row_parts[column block, row], column_parts[row block, column]: the tile's log-sum-exps, to base 2."""
    rows, columns = sizes[0], sizes[1]
    row, column, products = _tile(rows_ptr, columns_ptr, sizes, D, BLOCK_M, BLOCK_N, BLOCK_D)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2_E
    logits = products * scale
    row_exists, column_exists = row < rows, column < columns
    if BOTH:
        # A row and a column share one exponential, relative to the tile's largest logit. If all logits of a row or
        # column lie so far below it that their exponentials may become 0, both are computed again, relative to their
        # own largest logits. Rows and columns beyond the last repeat it.
        largest = tl.max(logits)
        exponentials = exp2(logits - largest)
        row_total = tl.sum(tl.where(column_exists[None, :], exponentials, 0.0), 1)
        column_total = tl.sum(tl.where(row_exists[:, None], exponentials, 0.0), 0)
        if tl.minimum(tl.min(row_total), tl.min(column_total)) > SMALLEST_TOTAL:
            row_lse, column_lse = largest + tl.log2(row_total), largest + tl.log2(column_total)
        else:
            # The products are computed again: holding them takes registers.
            _, _, products = _tile(rows_ptr, columns_ptr, sizes, D, BLOCK_M, BLOCK_N, BLOCK_D)
            logits = products * scale
            row_lse = _log_sum_exp(tl.where(column_exists[None, :], logits, float("-inf")), 1)
            column_lse = _log_sum_exp(tl.where(row_exists[:, None], logits, float("-inf")), 0)
    else:
        row_lse = _log_sum_exp(tl.where(column_exists[None, :], logits, float("-inf")), 1)
    program, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK_M)
    tl.store(row_parts_ptr + (program // blocks).to(tl.int64) * rows + row, row_lse, mask=row_exists)
    if BOTH:
        column_part = column_parts_ptr + (program % blocks).to(tl.int64) * columns
        tl.store(column_part + column, column_lse, mask=column_exists)


@triton.jit
def _merge_kernel(
    parts_ptr, lse_ptr, parts, columns, ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """lse[column] = ln Σ_part 2^parts[part, column], plus what lse already holds if ACCUMULATE."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = column < columns
    if ACCUMULATE:
        largest = tl.load(lse_ptr + column, mask=exists, other=0.0) * LOG2_E
        total = tl.full([BLOCK_N], 1.0, tl.float32)
    else:
        largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        # Masked columns load 0 to avoid inf - inf.
        inside = (part < parts)[:, None] & exists[None, :]
        block = tl.load(parts_ptr + part[:, None] * columns + column[None, :], mask=inside, other=0.0)
        block = tl.where((part < parts)[:, None], block, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(block, 0))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(block - new_largest[None, :]), 0)
        largest = new_largest
    tl.store(lse_ptr + column, (largest + tl.log2(total)) / LOG2_E, mask=exists)


@triton.jit
def _weights_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    row_lse_ptr,
    column_lse_ptr,
    weights_ptr,
    sizes,
    numbers,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """2^-row_shift · softmax over the row + 2^-column_shift · softmax over the column - positive, at own columns."""
    rows, columns = sizes[0], sizes[1]
    weights_stride, first_row, row_prompts, column_prompts, row_shift, column_shift, positive = numbers
    row, column, products = _tile(rows_ptr, columns_ptr, sizes, D, BLOCK_M, BLOCK_N, BLOCK_D)
    logits = products * (tl.load(scale_ptr).to(tl.float32) * LOG2_E)
    row_exists, column_exists = row < rows, column < columns
    row_shift += tl.load(row_lse_ptr + row, mask=row_exists, other=float("inf")) * LOG2_E
    column_shift += tl.load(column_lse_ptr + column, mask=column_exists, other=float("inf")) * LOG2_E
    weights = tl.exp2(logits - row_shift[:, None]) + tl.exp2(logits - column_shift[None, :])
    own = ((first_row + row) // row_prompts)[:, None] == (column // column_prompts)[None, :]
    weights = tl.where(own, weights - positive, weights)
    exist = row_exists[:, None] & column_exists[None, :]
    weights_tile = weights_ptr + row.to(tl.int64)[:, None] * weights_stride + column[None, :]
    tl.store(weights_tile, rounded(weights, weights_ptr.dtype.element_ty), mask=exist)


def _strips(rows: int, bytes_per_row: float, budget: int) -> list[slice]:
    """Strips of the rows, each within `budget` bytes but of at least 128 rows."""
    size = max(128, int(budget / bytes_per_row) // 128 * 128)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _cut(x: Tensor, strip: slice) -> Tensor:
    """``x[strip]``, or `x` itself if the strip is all of `x`."""
    return x if strip.stop - strip.start == x.shape[0] else x[strip]


def _tiles(rows: Tensor, columns: Tensor, config: Config) -> tuple[tuple[int], tuple[int, ...], dict]:
    """Grid, sizes and constexprs of a kernel over tiles."""
    grid = (cdiv(rows.shape[0], config.blocks["BLOCK_M"]) * cdiv(columns.shape[0], config.blocks["BLOCK_N"]),)
    sizes = (rows.shape[0], columns.shape[0], rows.stride(0), columns.stride(0))
    return grid, sizes, {"D": rows.shape[1], **config.kwargs}


def _tuned(name: str, sweep: Callable[[Config], None], rows: Tensor, columns: Tensor) -> None:
    if rows.dtype == torch.float32:
        table, candidates = CONFIGS_32, CANDIDATES_32
    else:
        table, candidates = CONFIGS_16 if rows.shape[1] % 64 == 0 else CONFIGS_MASKED, CANDIDATES_16
    tuned(name, sweep, rows, table, candidates, (rows.shape, columns.shape[0]))


def _merge(parts: Tensor, lse: Tensor, accumulate: bool) -> None:
    columns = parts.shape[1]
    grid = (cdiv(columns, MERGE_BLOCK["BLOCK_N"]),)
    _merge_kernel[grid](parts, lse, parts.shape[0], columns, ACCUMULATE=accumulate, **MERGE_BLOCK, num_warps=4)


def log_sum_exp_forward(
    rows: Tensor, columns: Tensor, scale: Tensor, both: bool, row_lse: Tensor, column_lse: Tensor
) -> None:
    """Log-sum-exps of the logits ``scale * rows @ columns.T`` over the columns of every row ``[M]`` and, if `both`,
    over the rows of every column ``[N]``, of rows ``[M, D]`` and columns ``[N, D]`` of one dtype, scale 0-d."""
    rows, columns = with_unit_channel_stride(rows), with_unit_channel_stride(columns)
    # 64: the smallest block of rows and of columns
    strips = _strips(rows.shape[0], 4 * columns.shape[0] * (1 + both) / 64, PARTIALS_BYTES)

    def sweep(config: Config) -> None:
        column_blocks = cdiv(columns.shape[0], config.blocks["BLOCK_N"])
        for strip in strips:
            part = _cut(rows, strip)
            row_blocks = cdiv(part.shape[0], config.blocks["BLOCK_M"]) if both else 0
            row_parts = row_lse.new_empty(column_blocks, part.shape[0])
            column_parts = row_lse.new_empty(row_blocks, columns.shape[0])
            grid, sizes, constexprs = _tiles(part, columns, config)
            _log_sum_exp_kernel[grid](part, columns, scale, row_parts, column_parts, sizes, BOTH=both, **constexprs)
            _merge(row_parts, _cut(row_lse, strip), False)
            if both:
                _merge(column_parts, column_lse, strip.start > 0)

    _tuned("contrastive_log_sum_exp", sweep, rows, columns)


def gradient_backward(
    rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, scale: Tensor, block: LogitBlock, *grads: Tensor
) -> None:
    """``W @ columns`` ``[M, D]`` and, if ``block.both``, ``W.T @ rows`` ``[N, D]``, with

    ``W = softmax over the row / row_prompts + softmax over the column / column_prompts - 2 * positives``, where the
    positives of a row are the prompts of its own sample, each ``1 / (row_prompts * column_prompts)``.
    """
    row_prompts, column_prompts, first_row, both = block
    grad_rows, grad_columns = grads
    rows, columns = with_unit_channel_stride(rows), with_unit_channel_stride(columns)
    row_lse, column_lse = row_lse.contiguous(), column_lse.contiguous()
    factor = 4096.0 if rows.dtype == torch.float16 else 1.0  # keeps small weights out of fp16's subnormal numbers
    shifts = (math.log2(row_prompts / factor), math.log2(column_prompts / factor))
    positive = 2 * factor / (row_prompts * column_prompts)
    width = cdiv(columns.shape[0], 8) * 8  # aligned rows
    strips = _strips(rows.shape[0], width * rows.element_size(), STRIP_BYTES)
    buffer = torch.empty(strips[0].stop, width, dtype=rows.dtype, device=rows.device)

    def sweep(config: Config) -> None:
        for strip in strips:
            part, first = _cut(rows, strip), first_row + strip.start
            grid, sizes, constexprs = _tiles(part, columns, config)
            arguments = (part, columns, scale, _cut(row_lse, strip), column_lse, buffer, sizes)
            numbers = (width, first, row_prompts, column_prompts, *shifts, positive)
            _weights_kernel[grid](*arguments, numbers, **constexprs)
            weights = buffer[: part.shape[0], : columns.shape[0]]
            _multiply(weights, columns, _cut(grad_rows, strip), add=False)
            if both:
                _multiply(weights.mT, part, grad_columns, add=strip.start > 0)

    _tuned("contrastive_weights", sweep, rows, columns)
    if factor != 1.0:
        grad_rows /= factor
        grad_columns /= factor


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """``out (+)= a @ b``, accumulated and written in fp32 from operands of any dtype."""
    if a.device.type == "cpu" or a.dtype == torch.float32:
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
