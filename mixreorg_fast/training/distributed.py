"""Ranks and devices: the same code under ``deepspeed``, ``torchrun`` and plain ``python``."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .. import devices
from ..errors import UserError, extra

T = TypeVar("T")

# How long a collective waits for a rank that does not come. DeepSpeed's 10 minutes would end every process, without a
# name, while rank 0 still draws scenes or trains a tokenizer, and before Watch, which names the rank, gives up.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def initialise(device: str | None = None) -> World:
    """Join the process group that the launcher's environment describes, or one of a single process.

    NCCL with one GPU per local rank, or gloo on the CPU.

    Args:
        device: as :func:`mixreorg_fast.devices.choose`.

    Raises:
        UserError: DeepSpeed is missing, or a device. RankError: this node has fewer GPUs than ranks.
    """
    if "RANK" not in os.environ:  # plain `python train.py`; without these DeepSpeed looks for mpi4py
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    chosen = devices.choose(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        # Launchers set one thread per rank; the cores of the node are there to be shared out.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // devices.local_size()))
    os.environ["DS_ACCELERATOR"] = chosen.type
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if chosen.type == "cuda" else "gloo", verbose=False)
    wait_patiently()
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def wait_patiently() -> None:
    """Give the collectives of all process groups made so far PATIENCE.

    Called anew after DeepSpeed has made groups of its own, which start with the default of PyTorch (10 minutes under
    NCCL). Joining a group keeps its own, shorter limit: a node that never starts is noticed soon.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)


def import_deepspeed():
    """The deepspeed module, its chatter silenced.

    Raises:
        UserError: it is not installed.
    """
    # Without nvcc, DeepSpeed warns of each operator for inference, which training does not use. It reads this variable
    # in their checks alone: a machine with nvcc builds the same operators with and without it.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"training needs DeepSpeed ({error}): {extra('train')}") from None
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    logger.addFilter(_concerns_us)
    warnings.filterwarnings("ignore", ".*(all_gather_into|reduce_scatter)_tensor.*", FutureWarning)
    # The CPU's shared-memory all-reduce serves DeepSpeed's inference alone, yet joining the process group compiles it
    # (C++, half a minute, and a lock that stays if it is cut short) and leaves 64 MiB per rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _concerns_us(record: logging.LogRecord) -> bool:
    """Whether a message of DeepSpeed's is news: every optimizer that it does not know by its class is "untested"."""
    return "untested optimizer" not in record.getMessage()


def on_main(world: World, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone and give every rank its result, or its :class:`UserError`."""
    answer: list = [None, None]
    if world.is_main:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def mean_over_ranks(values: torch.Tensor, world: World) -> list[float]:
    """Mean of a small tensor over all ranks, read on the host (this synchronises)."""
    if world.size > 1:
        dist.all_reduce(values)
        values = values / world.size
    return values.tolist()


def leave(code: int) -> None:
    """End this process's part in the process group, before the interpreter is taken down around its threads, which
    now and then aborts.

    After an error (an exit `code` other than 0) others may be gone or waiting, and the group is not to be trusted:
    the process ends at once, with that code.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.destroy_process_group()
