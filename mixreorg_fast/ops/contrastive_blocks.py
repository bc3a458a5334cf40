"""Blocks of the contrastive loss's logits: their log-sum-exps, and gradients from them, in PyTorch and by kernels.

A block is any rows (images, or texts) against any columns (the other). Blocks combine: the log-sum-exp over columns
that arrive in parts is the logaddexp of the parts', a gradient over columns in parts their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.settings import LogitBlock
from .registration import kernel

CHUNK_ELEMENTS = 2**24  # logits that the PyTorch path holds at a time


class Blocks(NamedTuple):
    """One implementation, for blocks of any size.

    log_sum_exp(rows, columns, scale, both): of the logits ``scale * rows @ columns.T``, over every row's columns and,
        if `both`, over every column's rows (else empty), fp32.
    gradient(rows, columns, row_lse, column_lse, scale, block): the gradients of rows and, if ``block.both``, of columns
        (else empty), fp32, without the factor ``scale / (2 * B)``.
    """

    log_sum_exp: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LogitBlock], tuple[Tensor, Tensor]]


# The PyTorch path: chunks of rows.


def log_sum_exp_torch(rows: Tensor, columns: Tensor, scale: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    row_lse, column_lse = [], None
    for chunk in _chunks(rows, columns):
        logits = _product(rows[chunk], columns.mT) * scale
        row_lse.append(logits.logsumexp(1))
        if both:
            part = logits.logsumexp(0)
            column_lse = part if column_lse is None else torch.logaddexp(column_lse, part)
    return torch.cat(row_lse), scale.new_empty(0) if column_lse is None else column_lse


def gradient_torch(
    rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, scale: Tensor, block: LogitBlock
) -> tuple[Tensor, Tensor]:
    row_prompts, column_prompts, first_row, both = block
    grad_rows, grad_columns = [], None
    for chunk in _chunks(rows, columns):
        logits = _product(rows[chunk], columns.mT) * scale
        weights = (logits - row_lse[chunk, None]).exp_().div_(row_prompts)
        weights += (logits - column_lse).exp_().div_(column_prompts)
        del logits
        # Rows beyond the columns' last sample come from other ranks and have no positive here.
        ours = max(0, min(len(weights), len(columns) // column_prompts * row_prompts - first_row - chunk.start))
        row = torch.arange(ours, device=rows.device)
        sample = (first_row + chunk.start + row) // row_prompts
        own = sample[:, None] * column_prompts + torch.arange(column_prompts, device=rows.device)
        weights[row[:, None], own] -= 2 / (row_prompts * column_prompts)
        if rows.is_cuda and rows.dtype == torch.bfloat16:  # fp16 would lose the small weights
            weights = weights.bfloat16()
        grad_rows.append(_product(weights, columns))
        if both:
            part = _product(weights.mT, rows[chunk])
            grad_columns = part if grad_columns is None else grad_columns + part
    return torch.cat(grad_rows), scale.new_empty(0) if grad_columns is None else grad_columns


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from operands of any dtype."""
    if a.is_cuda and a.dtype == b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def _chunks(rows: Tensor, columns: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, len(columns)))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


TORCH = Blocks(log_sum_exp_torch, gradient_torch)


# The Triton path.


@kernel("contrastive_loss.log_sum_exp_forward")
def contrastive_log_sum_exp(rows: Tensor, columns: Tensor, scale: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    make = partial(rows.new_empty, dtype=torch.float32)
    return make(rows.shape[:1]), make(columns.shape[:1] if both else 0)


@kernel("contrastive_loss.gradient_backward")
def contrastive_gradient(
    rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, scale: Tensor, block: LogitBlock
) -> tuple[Tensor, Tensor]:
    make = partial(rows.new_empty, dtype=torch.float32)
    return make(rows.shape), make(columns.shape if block.both else 0)


TRITON = Blocks(contrastive_log_sum_exp, contrastive_gradient)
