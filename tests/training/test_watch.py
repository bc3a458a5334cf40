"""What the watch counts as a hang, in one process; tests/training/test_faults.py has hangs of real ranks."""

from __future__ import annotations

import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mixreorg_fast.config import TrainConfig
from mixreorg_fast.ranks import PATIENCE, Ranks, wait_patiently
from mixreorg_fast.training import watch as module
from mixreorg_fast.training.distributed import initialise
from mixreorg_fast.training.watch import Watch

TIMEOUT = 1.0


@pytest.fixture
def ends(monkeypatch) -> list[str]:
    """The reasons for which ranks would have ended; their watches share a store."""
    found: list[str] = []

    def end(watch: Watch, reason: str, *, speaks: bool = True) -> None:
        found.append(reason)
        watch._stop.set()

    store = dist.HashStore()
    monkeypatch.setattr(module, "_store", lambda ranks: store)
    monkeypatch.setattr(Watch, "_end", end)
    return found


def wait_for(ends: list[str]) -> str:
    until = time.monotonic() + 30
    while not ends and time.monotonic() < until:
        time.sleep(0.05)
    return ends[0]


def make(tmp_path, rank: int = 0, size: int = 1) -> Watch:
    return Watch(Ranks(rank, size, torch.device("cpu")), TIMEOUT, tmp_path)


@pytest.mark.slow
def test_compiling_is_not_timed(tmp_path, ends):
    def compiler(graph: torch.fx.GraphModule, inputs: list):
        time.sleep(4 * TIMEOUT)
        return graph

    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(1))  # imports what the first compilation needs
    with make(tmp_path) as watch:
        watch.at(1, "forward and backward")
        torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(1))
        assert not ends
        assert "no progress" in wait_for(ends)  # from here on the same place is a hang


@pytest.mark.slow
def test_a_rank_that_compiles_is_waited_for(tmp_path, ends):
    with make(tmp_path, 0, 2) as waiting, make(tmp_path, 1, 2) as compiling:
        compiling.at(1, "forward and backward")
        compiling._start_compiling(None)
        for place in ("forward and backward", "exchange between ranks"):
            waiting.at(1, place)
        time.sleep(5 * TIMEOUT)
        assert not ends
        compiling._stop_compiling(None)
        assert "rank 1 on" in wait_for(ends) and "hangs (step 1, forward and backward)" in ends[0]


def test_collectives_wait_for_longer_than_the_watch():
    """Those of every group, DeepSpeed's own included, which ends the process after ten minutes by default."""
    pytest.importorskip("deepspeed")
    from deepspeed.utils import groups

    with mock.patch.dict(os.environ):
        initialise()
    groups._clone_world_group()
    wait_patiently()
    longest = next(entry.le for entry in TrainConfig.model_fields["timeout"].metadata if hasattr(entry, "le"))
    for group in dist.distributed_c10d._world.pg_map:
        assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    assert PATIENCE.total_seconds() > longest
