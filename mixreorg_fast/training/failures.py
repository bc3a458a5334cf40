"""Errors of the machine that a run reports in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import Config
from ..errors import RankError


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
        if not settings.checkpoint_activations:
            choices.append("train.checkpoint_activations=true")
        choices.append(f"a train.batch below {settings.batch}")
        raise RankError(
            f"out of memory with {micro_batch} images per rank and micro-step; set {', or '.join(choices)}"
        ) from error
