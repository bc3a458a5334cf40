"""Joining and leaving the process group, under ``deepspeed``, ``torchrun`` and plain ``python`` alike; errors of one
rank in one line."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from .. import devices
from ..config import Config
from ..errors import RankError, UserError, extra
from ..ranks import Ranks, local_size, wait_patiently


def initialise(device: str | None = None) -> Ranks:
    """Join the process group that the launcher's environment describes, or one of a single process.

    NCCL with one GPU per local rank, or gloo on the CPU; `device`: as :func:`mixreorg_fast.devices.choose`. A UserError
    says that DeepSpeed or a device is missing, a RankError that this node has fewer GPUs than ranks.
    """
    if "RANK" not in os.environ:  # plain `python train.py`: without these variables DeepSpeed looks for mpi4py
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    chosen = devices.choose(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        # Launchers set one thread per rank, which would leave cores of the node unused.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))
    os.environ["DS_ACCELERATOR"] = chosen.type
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if chosen.type == "cuda" else "gloo", verbose=False)
    wait_patiently()
    return Ranks(dist.get_rank(), dist.get_world_size(), chosen)


@functools.cache
def import_deepspeed():
    """The deepspeed module, without its messages, or a UserError where it is not installed."""
    # Without nvcc, DeepSpeed warns of each operator for inference, which training does not use. Only their checks read
    # this variable: a machine with nvcc builds the same operators with and without it.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"training needs DeepSpeed ({error}): {extra('train')}") from None
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls every optimizer of an unknown class "untested".
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", ".*(all_gather_into|reduce_scatter)_tensor.*", FutureWarning)
    # Only DeepSpeed's inference uses the CPU's shared-memory all-reduce, but joining the process group compiles it
    # (C++, half a minute, and a lock that stays after an interruption) and leaves 64 MiB per rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def leave(code: int) -> None:
    """Leave the process group before the interpreter exits: an exit while the group's threads run may abort.

    After an error (an exit `code` other than 0) other ranks may be gone or waiting, so the process exits at once with
    that code.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.destroy_process_group()


@contextlib.contextmanager
def full_disk_in_one_line(run: Path) -> Iterator[None]:
    """Raise a :class:`RankError` in place of the OSError of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankError(f"{run} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def out_of_memory_in_one_line(config: Config, micro_batch: int) -> Iterator[None]:
    """Raise a :class:`RankError` with the settings that need less memory in place of PyTorch's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        settings = config.train
        groups = micro_batch * settings.accumulation // config.group_size
        splits = [n for n in range(settings.accumulation + 1, groups + 1) if groups % n == 0]
        choices = [f"train.accumulation={splits[0]} with train.grad_cache=true"] if splits else []
        if not settings.checkpoint_activations and not settings.cuda_graphs:
            choices.append("train.checkpoint_activations=true")
        choices.append(f"a train.batch below {settings.batch}")
        raise RankError(
            f"out of memory with {micro_batch} images per rank and micro-step; set {', or '.join(choices)}"
        ) from error
