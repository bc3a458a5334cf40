"""Ranks of torch.distributed: which rank this process is, and what the ranks exchange.

Without a process group every function treats this process as the only rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

T = TypeVar("T")

# How long a collective waits for a missing rank. PyTorch's and DeepSpeed's default of 10 minutes would end every
# process, without naming the missing rank, while rank 0 draws scenes, trains a tokenizer or writes pictures.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and the device of this rank."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in `group`, by default in the default group."""
    return dist.get_rank(group) if _has_group() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks of `group`, by default of the default group."""
    return dist.get_world_size(group) if _has_group() else 1


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def local_rank() -> int:
    """This process's number among the ranks of its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Ranks on this node: torchrun sets LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def wait_patiently() -> None:
    """Let the collectives of all existing process groups wait for PATIENCE.

    Call it again after DeepSpeed has made groups of its own, which start with PyTorch's default (10 minutes under
    NCCL). Joining a group keeps its own, shorter limit: a node that never starts is noticed soon.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)


# ---------------------------------------------------------------------- values of the host


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone and give every rank its result, or its :class:`UserError`."""
    answer: list = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, in order of rank; values are pickled."""
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------- tensors


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values`, overwritten by the sum of each element over all ranks; without gradients."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """`values`, overwritten by the maximum of each element over all ranks."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def _sum_of_ranks(x: Tensor) -> Tensor:
    return sum_over_ranks(x.clone())


class _EagerSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_of_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The loss of every rank depends on the sum, so its gradient is the sum of all ranks' gradients."""
        return all_reduce_sum(grad)


# Only code that traces calls the custom op: it costs the host 0.1 ms more than an autograd function.
_traced_sum = torch.library.custom_op("mixreorg::all_reduce_sum", _sum_of_ranks, mutates_args=())
_traced_sum.register_fake(torch.empty_like)
_traced_sum.register_autograd(_EagerSum.backward)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Differentiable sum of `x` over all ranks."""
    if world_size() == 1:
        return x
    return _traced_sum(x) if torch.compiler.is_compiling() else _EagerSum.apply(x)


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, differentiable, and the index of this rank's first row; each rank has as many as `x`."""
    if world_size() == 1:
        return x, 0
    first, total = len(x) * rank(), len(x) * world_size()
    before, after = (x.new_zeros(count, *x.shape[1:]) for count in (first, total - first - len(x)))
    return all_reduce_sum(torch.cat([before, x, after])), first


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks of `group`, without gradients; each rank has as many as `x`."""
    if world_size(group) == 1:
        return x
    out = x.new_empty(world_size(group), *x.shape)
    dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out.flatten(0, 1)


class Ring:
    """The ranks of a group in a circle."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.size, rank = dist.get_world_size(group), dist.get_rank(group)
        self._group = group
        self._to, self._from = (rank + 1) % self.size, (rank - 1) % self.size

    def pass_on(self, *tensors: Tensor, tag: int = 0) -> Callable[[], list[Tensor]]:
        """Start sending `tensors` to the next rank; returns a function that waits for those of the previous rank.

        `tag` is the number of the first tensor. Transfers that overlap need different tags.
        """
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        transfers = [dist.P2POp(dist.isend, x, None, self._group, tag + i, self._to) for i, x in enumerate(sent)]
        transfers += [dist.P2POp(dist.irecv, x, None, self._group, tag + i, self._from) for i, x in enumerate(received)]
        works = dist.batch_isend_irecv(transfers)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            sent.clear()  # the tensors had to live until now
            return received

        return wait

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a 0-d tensor over the ranks; the same bits on each rank."""
        return all_gather(x[None], self._group).mean()
