"""Nothing in a micro-step waits for the GPU; what the optimizer's step waits for is known by name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixreorg_fast.devices import upload
from mixreorg_fast.training.optimisation import deepspeed_config
from tests.synchronisations import Synchronisations
from tests.tiny import tiny_config

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]

NORM = {
    # DeepSpeed's norm of the gradients, which it reads: of the whole, and before clipping each of two parameter groups.
    "deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": 2,
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": 3,
}
# Ours: the guard's norm, and whether a rank was asked to stop.
OUTCOME = {"mixreorg_fast/training/optimisation.py:outcome": 2}
OPTIMIZER_STEP = {
    "zero0": {"deepspeed/runtime/utils.py:clip_grad_norm_": 2} | OUTCOME,
    "zero1": NORM | OUTCOME,
    "zero2": NORM | OUTCOME,
    "zero2, grad cache": NORM | OUTCOME,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, list[str]]]:
    """What one rank of two waits for in a step of two micro-steps, by case."""
    out = tmp_path_factory.mktemp("synchronisation") / "found.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.training.synchronisation_worker", str(out)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.launch
@pytest.mark.parametrize("case", OPTIMIZER_STEP)
def test_micro_steps_wait_for_nothing(found, case):
    assert found[case]["micro-step"] == []


@pytest.mark.launch
@pytest.mark.parametrize("case", OPTIMIZER_STEP)
def test_the_optimizers_step_waits_for_what_is_known(found, case):
    assert Counter(found[case]["optimizer step"]) == OPTIMIZER_STEP[case]


def test_the_recorder_sees_what_waits():
    places: list[str] = []
    recorder = Synchronisations(places.append)

    def count(work) -> int:
        places.clear()
        with recorder.recorded():
            gpu = torch.zeros(4, device="cpu")  # a device named: the GPU's
            work(gpu, torch.ones(4), gpu + 1)
        return len(places)

    in_backward = torch.ones(1, requires_grad=True)
    in_backward.register_hook(lambda gradient: torch.tensor([1.0], device="cpu"))
    waiting = [
        lambda gpu, host, other: other.sum().item(),
        lambda gpu, host, other: bool(gpu[0] > 0),
        lambda gpu, host, other: other.tolist(),
        lambda gpu, host, other: gpu.nonzero(),
        lambda gpu, host, other: gpu[other > 0],
        lambda gpu, host, other: gpu.copy_(host),
        lambda gpu, host, other: host.to("cpu", non_blocking=True),
        lambda gpu, host, other: host.pin_memory().to("cpu"),
        lambda gpu, host, other: torch.tensor(3, device="cpu"),
        lambda gpu, host, other: gpu.new_tensor([1.0]),
        lambda gpu, host, other: torch.repeat_interleave(gpu, (other > 0).long()),
        lambda gpu, host, other: in_backward.sum().backward(),
    ]
    assert [count(work) for work in waiting] == [1] * len(waiting)
    free = [
        lambda gpu, host, other: host.sum().item() + len(host.tolist()) + len(host[host > 0]),
        lambda gpu, host, other: torch.where(gpu > 0, other, 0).masked_fill(gpu > 1, 2.0),
        lambda gpu, host, other: host.pin_memory().to("cpu", non_blocking=True) + gpu,
        lambda gpu, host, other: torch.full((), 3, device="cpu"),
        lambda gpu, host, other: gpu.to(torch.bfloat16).to(gpu.device),
    ]
    assert [count(work) for work in free] == [0] * len(free)


def test_uploads_go_through_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    upload(torch.ones(1), torch.device("cpu"))
    assert "pin" not in calls
    calls.clear()
    upload(torch.ones(1), torch.device("cuda", 0))
    assert calls == ["pin", ((torch.device("cuda", 0),), {"non_blocking": True})]


def test_deepspeed_neither_times_nor_takes_two_gigabytes():
    config = tiny_config(deepspeed={"zero_stage": 1})
    settings = deepspeed_config(config, 1)
    assert settings["timers"] == {"throughput": {"enabled": False}}
    assert settings["zero_optimization"]["reduce_bucket_size"] * 4 == 2**26  # fp32
    own = {"zero_optimization": {"reduce_bucket_size": 1000}, "timers": {"throughput": {"enabled": True}}}
    settings = deepspeed_config(tiny_config(deepspeed={"options": own}), 1)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000 and settings["timers"] == own["timers"]
