"""Faults while two ranks train: killed ranks and launchers, preemption, a full disk, slow and hung ranks, losses that
are NaN, gradients that leap.

One run, hit by one fault after the other, ends with exactly the weights of a run without faults.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixreorg_fast.config import ScenesConfig, merged
from mixreorg_fast.data.scenes.folder import ensure_scenes
from mixreorg_fast.training import checkpoint
from mixreorg_fast.training.optimisation import SETTLED, StepGuard
from tests.tiny import tiny_config

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    ensure_scenes(ScenesConfig(folder=str(folder / "scenes"), train=40, val=4, size=32))
    return folder


def config(folder: Path, name: str, **train) -> dict:
    base = tiny_config().model_dump(mode="json")
    base["model"]["text"]["vocab_size"] = 0
    return merged(
        base,
        {
            "name": name,
            "output": str(folder / "runs"),
            "model": {"text": {"context": 24}},
            "data": {
                "shards": str(folder / "scenes" / "train-*.tar"),
                "vocab_size": 300,
                "threads": 1,
                "augment": {"rand_augment_ops": 0},  # building its graph takes longer than the steps here
            },
            "train": {"batch": 8, "steps": STEPS, "log_every": 1, **train},
            "checkpoint": {"every": 2, "keep": 9},
        },
    )


def start(folder: Path, *runs: tuple[dict, dict]) -> subprocess.Popen:
    """``deepspeed`` with two ranks of faults_worker.py, in a process group of its own; runs: (config, faults)."""
    path = folder / "runs.json"
    path.write_text(json.dumps([{"config": config, "faults": faults} for config, faults in runs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    binaries = Path(sys.executable).parent
    command = [str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", port, "--module"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(
        [*command, "tests.training.faults_worker", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code of the launcher and the output of all, once the last rank is gone."""
    try:
        output, _ = process.communicate(timeout=280)  # reads until the last process has closed it
        return process.returncode, output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def steps(run: Path) -> list[int]:
    return [int(path.name.split("_")[1]) for path in checkpoint.complete(run)]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 8 MB; None where none may be mounted."""
    place = tmp_path_factory.mktemp("small_disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def reference(folder, small_disk):
    """A run whose fifth step is skipped, and others in the same launch: one that is NaN from its third step on and
    has a slow rank; one whose disk is full, in truth and not, and the same once more, with room; one whose gradients
    leap when they have settled; one with accumulation and one without, which is prepared for longer than collectives
    waited; last, one that hangs."""
    nan = {"nan": [5]}
    cached = config(folder, "cached", batch=32, steps=3, accumulation=4, grad_cache=True)
    cached["deepspeed"]["zero_stage"] = 3  # which plans ahead of the order that modules run in
    runs = [
        (config(folder, "nan"), {"nan": list(range(3, 9)), "slow": [0.5, 1]}),
        (config(folder, "full"), {"full": 4}),
        (config(folder, "reference"), nan),
        (config(folder, "spike", steps=SETTLED + 9), {"spike": [SETTLED + 1, *range(SETTLED + 3, SETTLED + 9)]}),
        (config(folder, "whole", batch=32, steps=3), {"impatient": 5, "prepare": 8}),
        (cached, {}),
        (config(folder, "hung", timeout=8.0), {"impatient": 5, "hang": (3, 1)}),
    ]
    if small_disk is not None:
        on_it = {**config(folder, "filled"), "output": str(small_disk)}
        runs[1:1] = [(on_it, nan | {"fill": 4}), (on_it, nan)]
    code, output = finish(start(folder, *runs))
    assert code == 1, output[-4000:]
    return folder / "runs" / "reference", output


def reports_of(run: Path) -> dict[int, dict]:
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def assert_same_end(run: Path, other: Path) -> None:
    """Weights and moments after the last step are equal, bit for bit."""
    for name in ("model.safetensors", checkpoint.OPTIMIZER):
        ours, theirs = (load_file(r / "checkpoints" / f"step_{STEPS:08d}" / name) for r in (run, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.launch
def test_steps_that_are_nan_are_skipped_and_then_stop_the_run(folder, reference):
    run, output = reference
    reports = reports_of(run)
    assert [reports[step]["skipped_steps"] for step in range(1, STEPS + 1)] == [0] * 4 + [1] * 4
    assert "loss" not in reports[5] and reports[6]["loss"] > 0
    (four, six) = (load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (4, 6))
    assert all(torch.isfinite(value).all() for value in six.values())
    batches = "image_projection.norm.num_batches_tracked"
    assert six[batches] - four[batches] == 1  # of two steps

    assert "step 5: gradient norm inf; 3 steps in a row were skipped" in output
    aside = folder / "runs" / "nan" / "skipped" / "step_00000005"
    assert len(json.loads((aside / "rank_00001_micro_000.json").read_text())["keys"]) == 4
    assert load_file(aside / "rank_00001_micro_000.safetensors")["images"].shape == (4, 3, 32, 32)
    assert steps(folder / "runs" / "nan") == [2, 4]


@pytest.mark.launch
def test_a_run_survives_one_fault_after_the_other(folder, reference):
    run = folder / "runs" / "struck"
    every = {"nan": [5]}

    def struck(**faults) -> tuple[int, str]:
        return finish(start(folder, (config(folder, "struck"), {**every, **faults})))

    code, output = struck(kill=(4, 1))  # a rank is lost in mid-step
    assert code != 0 and steps(run) == [2], output[-3000:]

    code, output = struck(kill_saving=4)  # and once more while the checkpoint is written
    assert code != 0 and steps(run) == [2], output[-3000:]
    assert f"resumed from {run / 'checkpoints' / 'step_00000002'}" in output

    code, output = struck(terminate=(4, 1))  # one rank is told to go
    assert code == 0 and steps(run) == [2, 4], output[-3000:]
    assert f"the same command resumes from {run / 'checkpoints' / 'step_00000004'}" in output

    code, output = struck(kill_launcher=(5, 0), slow=[0.7, 0])  # the ranks notice within a second or two
    assert code == -signal.SIGKILL and "stopped by SIGTERM" in output, output[-3000:]
    assert steps(run)[-1] < STEPS

    code, output = struck()
    assert code == 0, output[-3000:]
    assert not list(run.rglob("*.partial"))
    assert_same_end(run, reference[0])
    assert list(reports_of(run)) == list(range(1, STEPS + 1)) and (run / "losses.png").stat().st_size > 0


@pytest.mark.launch
def test_a_full_disk_leaves_the_checkpoint_before(folder, reference):
    run = folder / "runs" / "full"
    lines = reference[1].splitlines()
    (line,) = {line for line in lines if line.startswith("refused:") and str(run) in line}  # every rank has the same
    assert "step_00000004 cannot be written (No space left on device)" in line and "step_00000002 is intact" in line
    assert steps(run) == [2] and checkpoint.read_state(checkpoint.complete(run)[0], {})["step"] == 2
    assert not list(run.rglob("*.partial"))


@pytest.mark.root
@pytest.mark.launch
def test_a_disk_that_is_full_in_truth(small_disk, reference):
    """Refused, with the checkpoint before intact; with free space again, the run resumes from it and ends the same."""
    if small_disk is None:
        pytest.skip("mounting a small disk needs root")
    run = small_disk / "filled"
    lines = reference[1].splitlines()
    (line,) = {line for line in lines if line.startswith("refused:") and str(run) in line}
    assert "step_00000004 cannot be written" in line and "No space left on device" in line
    assert "step_00000002 is intact" in line
    assert f"resumed from {run / 'checkpoints' / 'step_00000002'} at step 2" in reference[1]
    assert not list(run.rglob("*.partial"))
    assert_same_end(run, reference[0])


@pytest.mark.launch
def test_leaps_of_the_gradient_are_skipped_and_then_stop_the_run(folder, reference):
    run, first = folder / "runs" / "spike", SETTLED + 1
    reports = reports_of(run)
    assert [reports[first + i]["skipped_steps"] for i in range(-1, 4)] == [0, 1, 1, 2, 3]
    assert reports[first]["grad_norm"] > 1e4 * reports[first - 1]["grad_norm"] and "loss" not in reports[first]
    assert reports[first + 1]["loss"] < 2 * reports[first - 1]["loss"]
    stop = first + 4  # the third in a row
    assert f"step {stop}: gradient norm" in reference[1] and "skipped" in reference[1]
    assert len(list((run / "skipped" / f"step_{stop:08d}").glob("*.safetensors"))) == 2
    before, after = (  # both steps between were skipped
        load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (stop - 3, stop - 1)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert steps(run)[-1] == stop - 1 and list(reports)[-1] == stop - 1


@pytest.mark.launch
def test_heartbeat(reference):
    beat = json.loads((reference[0] / "heartbeat.json").read_text())
    assert beat["time"] > 1e9 and beat["pid"] > 1 and 0 <= beat["step"] <= STEPS and beat["place"]


@pytest.mark.launch
def test_a_slow_rank_is_named(folder, reference):
    reports = reports_of(folder / "runs" / "nan")
    for step in (3, 4):  # the first ones have more to wait for
        times = reports[step]["rank_seconds"]
        assert times["slowest"] == 1 and times["max"] > 0.5 and times["host"]
        assert times["min"] <= times["mean"] <= times["max"]
    assert "rank 1 on" in reference[1] and "more than the ranks' mean" in reference[1]


@pytest.mark.launch
def test_grad_cache_trains_as_one_big_batch(folder, reference):
    """Two ranks: four micro-steps, or one. The random numbers are the same too."""
    whole, cached = (reports_of(folder / "runs" / name) for name in ("whole", "cached"))
    assert cached.keys() == whole.keys() == {1, 2, 3}
    for name in ("loss", "loss_original", "loss_restored", "loss_mixed", "groups_used", "grad_norm", "temperature"):
        assert cached[1][name] == pytest.approx(whole[1][name], rel=1e-5), name
        assert cached[3][name] == pytest.approx(whole[3][name], rel=1e-2), name


@pytest.mark.launch
def test_a_rank_without_memory_says_what_to_set(folder):
    """And ends, and with it the others, which wait for it."""
    settings = config(folder, "memory", batch=16, accumulation=1, timeout=60.0)
    code, output = finish(start(folder, (settings, {"memory": (3, 1)})))
    assert code in (1, 2), output[-3000:]  # that of rank 1, or of rank 0, which loses its connection to it
    (line,) = (line for line in output.splitlines() if "out of memory" in line)
    assert line.startswith("error: out of memory with 8 images per rank and micro-step; set train.accumulation=2 with")
    assert line.endswith("train.grad_cache=true, or train.checkpoint_activations=true, or a train.batch below 16")
    assert "[rank1]: Traceback" not in output and "no progress" not in output
    assert steps(folder / "runs" / "memory") == [2]


@pytest.mark.launch
def test_preparing_may_take_longer_than_collectives_waited(folder, reference):
    assert list(reports_of(folder / "runs" / "whole")) == [1, 2, 3]


@pytest.mark.launch
def test_a_hung_rank_is_named(reference):
    """By Watch, before the collectives give up."""
    errors = [line for line in reference[1].splitlines() if line.startswith("error:")]
    assert any("no progress for 8 s" in e and "rank 1 on" in e and "hangs (step 3" in e for e in errors), errors


def test_guard():
    guard = StepGuard(10.0)
    assert not guard.record(1e9)  # nothing is known yet
    guard = StepGuard(10.0)
    for _ in range(SETTLED):
        assert not guard.record(2.0)
    assert guard.refuses(20.1) and not guard.refuses(19.9)
    assert guard.record(float("nan")) and guard.record(1000.0)
    again = StepGuard(10.0, **json.loads(json.dumps(guard.state())))
    assert (again.skipped, again.in_a_row, again.taken) == (2, 2, SETTLED)
    assert not again.record(3.0) and again.in_a_row == 0
    assert not StepGuard(0.0, **guard.state()).refuses(1e30)
