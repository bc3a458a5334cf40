"""A run folder belongs to its run; a finished run stays as it is; Ctrl-C keeps what was trained; what a run says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixreorg_fast.config import merged, parse_config
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.errors import UserError
from mixreorg_fast.training import checkpoint, preparation
from mixreorg_fast.training.watch import StopRequest
from tests.tiny import tiny_config

pytestmark = pytest.mark.launch

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]


def settings(folder: Path, **changes) -> dict:
    base = tiny_config().model_dump(mode="json")
    base["model"]["text"]["vocab_size"] = 0
    scenes = {"folder": str(folder / "scenes"), "train": 24, "val": 4, "size": 32}
    base = merged(base, {"name": "run", "output": str(folder / "runs"), "model": {"text": {"context": 24}}})
    base = merged(base, {"data": {"vocab_size": 300, "threads": 1, "scenes": scenes}, "train": {"log_every": 1}})
    return merged(base, {"train": {"steps": 2}, "eval": {"short_side": 32}, **changes})


ALONE = ("-m", "mixreorg_fast.cli", "train")
TWO_RANKS = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "mixreorg_fast.training.command",
)


def start(folder: Path, *options: str, command: tuple[str, ...] = ALONE, **changes) -> subprocess.Popen:
    """A training command in a process group of its own."""
    path = folder / "config.json"
    path.write_text(json.dumps(settings(folder, **changes)))
    return subprocess.Popen(
        [sys.executable, *command, "--config", str(path), "--device", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def train(folder: Path, *options: str, **changes) -> tuple[int, str, str]:
    process = start(folder, *options, **changes)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("run")
    code, out, err = train(folder)
    assert code == 0, out[-2000:] + err[-4000:]
    return folder, out, err


def test_what_a_run_says(run):
    folder, out, err = run
    lines = out.splitlines()
    assert lines[0].startswith("1 × CPU")
    place = f"in {folder / 'runs' / 'run'}"
    assert lines[1].startswith("24 samples of the embedded scenes") and lines[1].endswith(f"2 steps, {place}")
    assert "MixReorg of 0.1 million parameters" in lines[1]
    assert "for the remaining 1 steps, then the scores" in err
    assert lines[2].startswith("scenes: mIoU ") and "all background scores" in lines[2] and "oracle" in lines[2]
    assert any(line.startswith("oracle: the mIoU if every segment") for line in lines)
    assert any(line.startswith("pictures: segmentation.png, mixing.png") for line in lines)
    assert lines[-1] == f"next: mixreorg demo --weights {folder / 'runs' / 'run'}"
    for noise in ("WARNING", "FutureWarning", "untested", "[INFO]", "lr_scheduler"):
        assert noise not in out + err


def test_a_finished_run_changes_nothing(run):
    folder, first, _ = run
    beat = json.loads((folder / "runs/run/heartbeat.json").read_text())
    assert beat["finished"] is True and beat["place"] == "finished" and beat["step"] == 2
    before = snapshot(folder / "runs")
    code, out, err = train(folder)
    assert code == 0 and "is finished" in out, out + err
    assert out.splitlines()[-1] == first.splitlines()[-1] and "scenes: mIoU" in out
    assert snapshot(folder / "runs") == before


def test_another_configuration_is_refused(run):
    folder, *_ = run
    before = snapshot(folder / "runs")
    code, out, err = train(folder, "--set", f"data.shards={folder}/mine/train-*.tar", "--set", "model.tau=0.5")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "model.tau: 1.0 → 0.5" in err and "data.shards: the embedded scenes → " in err
    assert "--set name=NAME" in err and "--resume never" in err
    assert snapshot(folder / "runs") == before


def resolved(folder: Path, **changes) -> dict:
    """The run's own configuration as a run folder holds it, changed."""
    return merged(json.loads((folder / "runs/run/config.json").read_text()), changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"steps": 9, "lr": 1e-4, "precision": "bf16", "log_every": 5}},
        {"deepspeed": {"zero_stage": 0}, "checkpoint": {"every": 1}, "eval": {"every": 1}},
        {
            "data": {"threads": 3, "prefetch": 5, "max_bad": 0.5},
            "log": {"slow_rank": 0.5},
            "loss": {"exchange": "ring"},
        },
    ],
)
def test_what_may_change(run, changes):
    folder, *_ = run
    preparation.refuse_another(parse_config(merged(settings(folder), changes)), "auto")
    preparation.refuse_another(parse_config(resolved(folder, **changes)), "auto")  # config.json itself


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"seed": 3}, "seed: 0 → 3"),
        ({"model": {"method": "groupvit"}}, "model.method: mixreorg → groupvit"),
        ({"train": {"batch": 16}}, "train.batch: 8 → 16"),
        ({"data": {"scenes": {"train": 50}}}, "data.scenes.train: 24 → 50"),
        ({"mixing": {"blend": 0.1}, "loss": {"mixed": 0.5}}, "mixing.blend: 0.5 → 0.1, loss.mixed: 1.0 → 0.5"),
    ],
)
def test_what_must_stay(run, changes, found):
    folder, *_ = run
    config = parse_config(merged(settings(folder), changes))
    with pytest.raises(UserError, match=found):
        preparation.refuse_another(config, "auto")
    preparation.refuse_another(config, "never")


def test_shards_may_move(run, monkeypatch):
    """The same shards in another folder are the same data; others are not."""
    folder, *_ = run
    config = parse_config(resolved(folder, data={"shards": "moved/train-*.tar"}))
    was = json.loads((folder / "runs/run/config.json").read_text())
    was["data"]["shards"] = "here/train-*.tar"
    real = preparation.json_or_empty
    monkeypatch.setattr(preparation, "json_or_empty", lambda path: was if path.name == "config.json" else real(path))
    order = real(checkpoint.complete(config.run_folder)[-1] / checkpoint.STATE)["order"]
    monkeypatch.setattr(TrainingSet, "open", lambda config: SimpleNamespace(digest=order))
    preparation.refuse_another(config, "auto")
    monkeypatch.setattr(TrainingSet, "open", lambda config: SimpleNamespace(digest="another"))
    with pytest.raises(UserError, match="data.shards: here/train-.*.tar → moved/train"):
        preparation.refuse_another(config, "auto")


@pytest.mark.parametrize("command", [ALONE, TWO_RANKS], ids=["one process", "two ranks"])
def test_ctrl_c_keeps_what_was_trained(run, command):
    """One line, a checkpoint, exit code 130, no traceback but the launcher's; the same command resumes there."""
    folder, *_ = run
    name = f"stopped{len(command)}"
    process = start(folder, command=command, name=name, train={"steps": 5000})
    watch = folder / "runs" / name / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (watch.is_file() and watch.stat().st_size) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to launcher and ranks; torchrun sends it once more
    if command is ALONE:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    if command is ALONE:
        assert process.returncode == 130 and "Traceback" not in out + err, err[-3000:]
    assert "stopped by SIGINT; the same command resumes from" in err and "[rank" not in err, err[-3000:]
    (last,) = checkpoint.complete(folder / "runs" / name)
    beat = json.loads((folder / "runs" / name / "heartbeat.json").read_text())
    assert beat["place"] == "stopped" and beat["finished"] is False
    assert json.loads((last / checkpoint.STATE).read_text())["step"] == beat["step"] > 0


def test_a_second_signal_ends_at_once():
    code = f"""
import os, time
from mixreorg_fast.training.watch import StopRequest
with StopRequest() as stop:
    for _ in range(2):
        os.kill(os.getpid(), {signal.SIGINT})
    os.kill(os.getpid(), {signal.SIGTERM})
    print(stop.asked, flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), {signal.SIGINT})
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "2\n", "")
    before = signal.getsignal(signal.SIGINT)  # a shell in the background ignores it
    with StopRequest() as stop:
        assert not stop.asked
    assert signal.getsignal(signal.SIGINT) is before
