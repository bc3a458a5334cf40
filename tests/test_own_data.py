"""README's two commands for own data, as they stand there, on a folder of small photos."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mixreorg_fast

pytestmark = pytest.mark.launch

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[1]
COLOURS = ["red", "green", "blue", "white"]


def commands() -> list[list[str]]:
    """The block of README that trains on FOLDER."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "FOLDER" in block)
    return [shlex.split(line) for line in block.splitlines()]


def test_readme_commands_train_on_a_folder_of_photos(tmp_path):
    for name in ("train.py", "configs"):  # what the commands find in a checkout, without its data
        (tmp_path / name).symlink_to(ROOT / name)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (48 + number, 64), colour).save(photos / f"{number}.jpg")
        (photos / f"{number}.txt").write_text(f"a {colour} square number {number}\n")
    build, train = ([str(photos) if word == "FOLDER" else word for word in command] for command in commands())
    assert build[:3] == ["mixreorg", "shards", "build"] and train[:2] == ["deepspeed", "train.py"]

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    early = run(sys.executable, *train[1:])
    assert early.returncode == 2
    assert "no shard matches data/own/train-*.tar; docs/data.md tells how to make shards" in early.stderr

    done = run(*build)
    assert done.returncode == 0 and "wrote 40 samples" in done.stdout, done.stderr
    done = run(sys.executable, *train[1:])
    assert done.returncode == 2
    assert done.stderr == "error: train.batch 64 is more than the 40 samples of data.shards (nearest: 40)\n"

    tiny = {"train.steps": 2, "train.batch": 8, "model.image_size": 64, "model.text.layers": 1, "data.threads": 1}
    overrides = [word for key, value in tiny.items() for word in ("--set", f"{key}={value}")]
    done = run(*train, *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    folder = tmp_path / "runs" / "own"
    assert "no scores: the configuration names neither eval.datasets nor data.val_shards" in done.stdout
    assert "pictures: segments.png, mixing.png" in done.stdout
    assert not (folder / "eval.json").exists()
    assert Image.open(folder / "segments.png").width > 2 * 224
    assert json.loads((folder / "config.json").read_text())["model"]["text"]["vocab_size"] > 258
    labels = mixreorg_fast.load(folder).segment(photos / "0.jpg", COLOURS).labels
    assert labels.shape == (64, 48)
