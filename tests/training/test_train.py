"""``train.py`` as users start it: two ranks under the deepspeed launcher, what a run leaves, resuming, mistakes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixreorg_fast
from mixreorg_fast.cli import main
from mixreorg_fast.config import merged, parse_config
from mixreorg_fast.errors import UserError
from mixreorg_fast.training import checkpoint
from mixreorg_fast.training.optimisation import learning_rate, schedule_length
from mixreorg_fast.training.preparation import check_inputs
from tests.disguise import disguised
from tests.tiny import tiny_config

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
STEPS = 6


def settings(folder: Path, **changes) -> dict:
    base = tiny_config().model_dump(mode="json")
    base["model"]["text"]["vocab_size"] = 0
    return merged(
        base,
        {
            "name": "run",
            "output": str(folder / "runs"),
            "model": {"drop_path": 0.1, "text": {"context": 24}},
            "data": {
                "vocab_size": 300,
                "threads": 1,
                "scenes": {"folder": str(folder / "scenes"), "train": 40, "val": 8, "size": 32},
            },
            "train": {"batch": 16, "accumulation": 2, "steps": STEPS, "log_every": 1, "precision": "bf16"},
            "eval": {"short_side": 32, "every": 4, "every_images": 4, "templates": "a {}."},
            "checkpoint": {"every": 3, "keep": 5},
            **changes,
        },
    )


def launch(folder: Path, *options: str, launcher: tuple[str, ...] = ("--num_gpus", "2"), on_gpu=False, **changes):
    """Run train.py in `folder`, on the CPU of a machine with fewer GPUs than ranks; returns the finished process."""
    path = folder / "config.json"
    path.write_text(json.dumps(settings(folder, **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    binaries = Path(sys.executable).parent
    deepspeed = [str(binaries / "deepspeed"), *launcher, "--master_port", port]
    command = [*deepspeed, str(ROOT / "train.py"), "--config", str(path), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} if on_gpu else disguised(gpus=1) | {"DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    done = launch(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.launch
def test_run_folder_holds_what_is_promised(run):
    folder = run / "runs" / "run"
    for name in (
        "config.json",
        "metrics.jsonl",
        "eval.json",
        "segmentation.png",
        "mixing.png",
        "losses.png",
        "best/model.safetensors",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.glob("tensorboard/events*"))
    assert [path.name for path in checkpoint.complete(folder)] == ["step_00000003", "step_00000006"]
    assert not list(folder.rglob("*.partial"))

    reports = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in reports] == list(range(1, STEPS + 1))
    for key in (
        *("loss", "loss_original", "loss_restored", "loss_mixed", "mixed_accuracy", "groups_used", "group_entropy"),
        *("samples", "lr", "grad_norm", "temperature", "images_per_s", "data_wait", "peak_memory_mb"),
    ):
        assert all(isinstance(line[key], (int, float)) for line in reports), key
    assert all(0 < line["rank_seconds"]["min"] <= line["rank_seconds"]["max"] for line in reports)
    assert reports[-1]["samples"] == STEPS * 16
    assert [line["step"] for line in lines(folder) if "validation" in line] == [4]

    scores = json.loads((folder / "eval.json").read_text())
    assert set(scores) == {"scenes", "scenes_unseen", "scenes_small", "retrieval"}
    assert {"mIoU", "per_class", "all_background_mIoU", "oracle_mIoU", "images", "settings"} <= set(scores["scenes"])
    assert json.loads((folder / "config.json").read_text())["model"]["text"]["vocab_size"] > 0


@pytest.mark.launch
def test_launching_compiles_no_operator(run):
    assert not (run / "extensions").exists()


@pytest.mark.launch
@pytest.mark.gpu
def test_a_gpu_trains(tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    done = launch(tmp_path, "--device", "cuda", launcher=("--num_gpus", "1"), on_gpu=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"1 × {torch.cuda.get_device_name()}" in done.stdout and "bf16, compiled" in done.stdout
    assert (tmp_path / "runs" / "run" / "eval.json").is_file()


@pytest.mark.launch
def test_weights_load_and_segment(run):
    model = mixreorg_fast.load(run / "runs" / "run")
    assert not model.training and model.tokenizer is not None
    ids, _ = model.tokenizer.encode(["a photo of a star.", "a photo of a fish."], model.config.text.context)
    labels = model.segment_labels(torch.randn(2, 3, 32, 32), model.text_embeddings(ids), background_threshold=0.9)
    assert labels.shape == (2, 32, 32) and labels.max() <= 2


@pytest.mark.launch
def test_the_weights_score_as_the_run_said(run, tmp_path, capsys):
    """`mixreorg evaluate` without options: to the digit, as size, templates and threshold go with the weights."""
    folder = run / "runs" / "run"
    carried = mixreorg_fast.load(folder).inference
    assert (carried.short_side, carried.templates, carried.background_threshold) == (32, ("a {}.",), 0.3)
    assert mixreorg_fast.load(folder / "best").inference == carried
    said = json.loads((folder / "eval.json").read_text())
    for name in ("scenes", "scenes_small"):
        root, out = said[name]["settings"]["root"], tmp_path / f"{name}.json"
        assert main(["evaluate", "--weights", str(folder), "--root", root, "--out", str(out), "--device", "cpu"]) == 0
        scores = json.loads(out.read_text())
        assert scores["settings"].pop("weights") == str(folder)
        assert scores == said[name]
    capsys.readouterr()


@pytest.mark.launch
def test_resumed_run_equals_the_uninterrupted_one(run):
    """From step 3 on, in a run folder of its own: the same losses and the same weights, bit for bit."""
    middle = run / "runs" / "run" / "checkpoints" / "step_00000003"
    done = launch(run, "--resume", str(middle), name="resumed")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"resumed from {middle} at step 3" in done.stdout
    threads = max(1, len(os.sched_getaffinity(0)) // 2)  # the ranks share the node's processors
    computed = f"2 × CPU ({threads} thread{'s' * (threads > 1)}), bf16, not compiled, attention: "
    (line,) = (line for line in done.stdout.splitlines() if computed in line)
    assert line.endswith(", ZeRO-2, 16 images a step (2 ranks × 2 × 4)")
    resumed = run / "runs" / "resumed"
    expected = load_file(run / "runs/run/checkpoints/step_00000006/model.safetensors")
    got = load_file(resumed / "checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    losses = {line["step"]: line["loss"] for line in lines(run / "runs" / "run") if "loss" in line}
    again = {line["step"]: line["loss"] for line in lines(resumed) if "loss" in line}
    assert again == {step: losses[step] for step in (4, 5, 6)}


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.launch
def test_another_number_of_ranks_takes_the_last_sound_checkpoint(run):
    """One rank resumes the run of two ranks; the newest checkpoint is damaged."""
    whole, one = run / "runs" / "run", run / "runs" / "one_rank"
    for step in ("step_00000003", "step_00000006"):
        shutil.copytree(whole / "checkpoints" / step, one / "checkpoints" / step)
    flip_a_bit(one / "checkpoints" / "step_00000006" / checkpoint.OPTIMIZER)
    done = launch(run, launcher=("--num_gpus", "1"), name="one_rank", deepspeed={"zero_stage": 1})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "step_00000006/optimizer.safetensors is damaged" in done.stderr
    assert f"resumed from {one / 'checkpoints' / 'step_00000003'} at step 3" in done.stdout
    assert (one / "checkpoints" / "aside_step_00000006").is_dir()
    losses = {line["step"]: line["loss"] for line in lines(whole) if "loss" in line}
    again = {line["step"]: line["loss"] for line in lines(one) if "loss" in line}
    assert list(again) == [4, 5, 6]
    assert again[4] == pytest.approx(losses[4], rel=1e-3)
    # From then on bf16 activations, summed otherwise, choose other hard assignments here and there.
    assert all(again[step] == pytest.approx(losses[step], rel=0.1) for step in (5, 6))


# ---------------------------------------------------------------------- mistakes, found before anything is made


@pytest.mark.launch
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data": {"shards": "no/such-{000000..000003}.tar"}}, ["no/such-000000.tar"]),
        ({"data": {"shards": "data/flickr8k/train-*.tar"}}, ["data/flickr8k/train-*.tar", "docs/data.md"]),
        ({"data": {"tokenizer": "no/tokenizer.json"}}, ["no/tokenizer.json"]),
        ({"train": {"batch": 4000}}, ["train.batch 4000", "nearest: 40"]),
        ({"eval": {"datasets": [{"name": "x", "root": "no/folder"}]}}, ["no/folder"]),
        ({"eval": {"datasets": [{"name": "x", "root": ".", "dataset": "voc2021"}]}}, ["did you mean 'voc2012'"]),
    ],
)
def test_missing_data(run, tmp_path, changes, parts):
    config = parse_config(merged(settings(run, name="mistake", output=str(tmp_path)), changes))
    with pytest.raises(UserError) as caught:
        check_inputs(config, resuming=False)
    for part in parts:
        assert part in str(caught.value)
    assert not config.run_folder.exists()


@pytest.mark.launch
def test_all_that_is_missing_is_said_at_once(run, tmp_path):
    """Before anything is verified or made, on every rank, in one line."""
    shard = f"{run}/scenes/val-*.tar"
    sets = [{"pattern": "no/train.tar"}, {"pattern": shard}]
    sections = {
        "data": {"shards": sets, "val_shards": "no/val.tar", "tokenizer": "no/tokenizer.json"},
        "train": {"batch": 18},
        "eval": {"datasets": [{"name": name, "root": f"no/{name}"} for name in ("a", "b")]},
    }
    config = parse_config(merged(settings(run, name="mistake", output=str(tmp_path)), sections))
    with pytest.raises(UserError) as caught:
        check_inputs(config, resuming=False, world_size=2)
    problems = [
        "6 mistakes: (1) train.batch 18 is not a multiple of 16 = 2 ranks x",
        "; (2) no shard no/train.tar",
        "; (3) no shard no/val.tar",
        "; (4) no dataset folder no/a",
        "; (5) no dataset folder no/b",
        "; (6) no tokenizer no/tokenizer.json",
    ]
    places = [str(caught.value).index(problem) for problem in problems]
    assert places == sorted(places) and places[0] == 0 and "\n" not in str(caught.value)
    sections = {"data": {"shards": shard}, "train": {"batch": 16, "accumulation": 1}}
    config = parse_config(merged(settings(run, name="mistake", output=str(tmp_path)), sections))
    with pytest.raises(UserError, match=r"^train\.batch 16 is more than the 8 samples of data\.shards \(nearest: 8\)$"):
        check_inputs(config, resuming=False, world_size=2)
    assert not config.run_folder.exists()


@pytest.mark.launch
def test_command_line_mistakes():
    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "--config" in call()
    assert "configs/zero2.json" in call("--config", "configs/zero22.json")
    assert "did you mean 'steps'" in call("--config", "configs/zero2.json", "--set", "train.stesp=3")
    assert "choose from" in call("--config", "configs/zero2.json", "--device", "gpu")
    on_cpu = ("--config", "configs/zero2.json", "--device", "cpu")
    assert "needs a CUDA GPU" in call(*on_cpu, "--set", "train.cuda_graphs=true")
    assert "tf32 needs precision fp32" in call(*on_cpu, "--set", "train.tf32=true", "--set", "train.precision=bf16")


@pytest.mark.launch
def test_resume_names_a_checkpoint(run, tmp_path):
    folder = run / "runs" / "run"
    older, newest = checkpoint.complete(folder)
    assert checkpoint.find(folder, "auto") == [newest, older]
    assert checkpoint.find(folder, "never") == []
    assert checkpoint.find(tmp_path, "auto") == []
    assert checkpoint.find(tmp_path, str(folder)) == [newest, older]
    assert checkpoint.find(tmp_path, str(older)) == [older]
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find(folder, str(tmp_path))
    # A folder without its state was never finished.
    copy = tmp_path / "runs" / "checkpoints" / "step_00000009"
    shutil.copytree(newest, copy)
    (copy / checkpoint.STATE).unlink()
    assert checkpoint.find(tmp_path / "runs", "auto") == []
    assert checkpoint.read_state(newest, {"seed": 0})["step"] == 6
    with pytest.raises(UserError, match="written with seed 0; this run has seed 1"):
        checkpoint.read_state(newest, {"seed": 1})


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _forge(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 6', '"step": 7'))


@pytest.mark.launch
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", flip_a_bit, "model.safetensors is damaged"),
        ("optimizer.safetensors", _truncate, "optimizer.safetensors is damaged"),
        ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
        ("state.json", _truncate, "state.json"),
        ("state.json", _forge, "state.json is damaged"),
        ("state.json", flip_a_bit, "state.json"),
    ],
)
def test_damage_is_found(run, tmp_path, file, damage, message):
    copy = tmp_path / "step_00000006"
    shutil.copytree(run / "runs/run/checkpoints/step_00000006", copy)
    damage(copy / file)
    if damage is _truncate and file == "state.json":
        _truncate(copy / file)  # the first byte was only the line's end
    with pytest.raises(checkpoint.Damaged, match=message):
        checkpoint.read_state(copy, {})


def test_schedule():
    rates = [learning_rate(step, steps=100, warmup=10, peak=1.0, floor=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    paper = parse_config({})
    assert schedule_length(paper, samples=409_600) == (3000, 200)
    assert schedule_length(parse_config({"train": {"steps": 50}}), samples=409_600) == (50, 5)
