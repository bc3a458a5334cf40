"""From public data to published weights by their names: train from the hub, die, resume without network, publish."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mixreorg_fast.config import merged
from mixreorg_fast.data.shards.pair import write_shard
from tests.data.conftest import pairs
from tests.servers.repositories import TOKEN
from tests.tiny import tiny_config

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[1]
STEPS = 50


@pytest.mark.slow
@pytest.mark.launch
def test_from_shards_on_the_hub_to_weights_on_the_hub(hub, tmp_path):
    tars = {}
    for number in range(4):
        path = tmp_path / f"train-{number:04d}.tar"
        write_shard(path, pairs(12, 12 * number))
        tars[path.name] = path.read_bytes()
    hub.add("owner/set", tars, kind="dataset")
    reachable = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "home")}
    cut_off = {**reachable, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing answers there

    def start(*words: str, environment: dict[str, str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "mixreorg_fast.cli", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(*words: str, environment: dict[str, str]) -> str:
        process = start(*words, environment=environment)
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err[-3000:]
        return out + err

    def training(name: str) -> tuple[str, ...]:
        base = tiny_config(model={"text": {"vocab_size": 0, "context": 24}}).model_dump(mode="json")
        settings = {
            "name": name,
            "output": str(tmp_path / "runs"),
            "data": {
                "shards": "hf://datasets/owner/set/train-*.tar",
                "cache": {"folder": str(tmp_path / "cache"), "window": 2, "patience": 5.0},
                "vocab_size": 300,
                "threads": 1,
                "augment": {"rand_augment_ops": 0},
            },
            "train": {"steps": STEPS, "log_every": 1},
            "checkpoint": {"every": 10},
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(merged(base, settings)))
        return "train", str(path), "--device", "cpu"

    def weights(name: str) -> dict:
        return load_file(tmp_path / "runs" / name / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")

    run(*training("whole"), environment=reachable)
    killed = start(*training("killed"), environment=reachable)
    twentieth = tmp_path / "runs" / "killed" / "checkpoints" / "step_00000020"
    while not twentieth.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert "resumed from" in run(*training("killed"), environment=cut_off)
    resumed = weights("killed")
    assert resumed.keys() == weights("whole").keys()
    assert all(resumed[name].equal(tensor) for name, tensor in weights("whole").items())

    run("push", "runs/killed", "owner/weights", environment={**reachable, "HF_TOKEN": TOKEN})
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(tmp_path / "photo.png")
    words = ("segment", "photo.png", "--classes", "red, green", "--out")
    for place, source, environment in (
        ("local", "runs/killed", cut_off),
        ("hub", "owner/weights", reachable),
        ("cache", "owner/weights", cut_off),
    ):
        run(*words, place, "--weights", source, "--device", "cpu", environment=environment)
    local, *others = (np.array(Image.open(tmp_path / place / "photo.png")) for place in ("local", "hub", "cache"))
    assert all(np.array_equal(local, other) for other in others)
