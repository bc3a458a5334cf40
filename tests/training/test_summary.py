"""What a run says of itself in its first line, and the precision it sets."""

import json
import subprocess
import sys

import pytest
import torch

from mixreorg_fast import devices
from mixreorg_fast.config import parse_config
from mixreorg_fast.ranks import Ranks
from mixreorg_fast.training import checkpoint, preparation
from mixreorg_fast.training import summary as module
from mixreorg_fast.training.summary import summary
from tests.disguise import disguised


@pytest.mark.parametrize(
    ("train", "deepspeed", "parts"),
    [
        ({"precision": "bf16"}, {}, ["bf16, compiled, CUDA graphs, attention: torch/varlen, ZeRO-2, "]),
        ({}, {}, ["4096 images a step (8 ranks × 512)"]),
        ({"cuda_graphs": True, "accumulation": 4}, {}, ["compiled, CUDA graphs", "(8 ranks × 4 × 128)"]),
        ({"cuda_graphs": False}, {}, ["compiled, attention"]),
        ({"checkpoint_activations": True}, {}, ["compiled, attention"]),
        ({"compile": False}, {}, ["not compiled"]),
        ({}, {"zero_stage": 3}, ["not compiled", "ZeRO-3"]),
        ({"precision": "fp32", "tf32": True}, {}, ["fp32 (TF32), "]),
        ({"precision": "fp32"}, {}, ["fp32, "]),
    ],
)
def test_gpus(monkeypatch, train, deepspeed, parts):
    monkeypatch.setattr(devices, "driver", lambda: devices.Driver("580.65.06", 8))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(module, "_attention", lambda config, device: ("torch", "varlen"))
    line = summary(parse_config({"train": train, "deepspeed": deepspeed}), Ranks(0, 8, torch.device("cuda", 0)))
    assert line.startswith("8 × NVIDIA H100 80GB HBM3 (driver 580.65.06), ")
    assert all(part in line for part in parts), line


def test_a_cpu():
    line = summary(parse_config({"train": {"batch": 8, "precision": "fp32"}}), Ranks(0, 1, torch.device("cpu")))
    assert line.startswith("1 × CPU (")
    assert line.endswith("), fp32, not compiled, attention: torch/torch, ZeRO-2, 8 images a step")


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_auto_is_settled_by_the_device_or_the_run(monkeypatch, tmp_path, device, native, precision):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if native else (7, 5))
    config = parse_config({"output": str(tmp_path / "runs")})

    def settled(resume: str, config=config) -> str:
        return preparation.with_precision(config, resume, torch.device(device)).train.precision

    assert settled("auto") == precision
    assert config.train.precision == "auto"  # nothing is changed in place
    for given in ("bf16", "fp32"):
        assert settled("auto", parse_config({"train": {"precision": given}})) == given

    # A run of the other precision, begun on another machine: it keeps its own, and no setting counts as changed.
    other = {"bf16": "fp32", "fp32": "bf16"}[precision]
    began = config.model_copy(update={"train": config.train.model_copy(update={"precision": other})})
    step = config.run_folder / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    (step / checkpoint.STATE).write_text("{}")
    (config.run_folder / "config.json").write_text(json.dumps(began.model_dump(mode="json")))
    preparation.refuse_another(config, "auto")
    assert [settled(resume) for resume in ("auto", str(step), str(config.run_folder))] == [other] * 3
    monkeypatch.chdir(step.parent)
    assert settled(step.name) == other
    assert settled("never") == precision
    assert settled("auto", config.model_copy(update={"name": "new"})) == precision


@pytest.mark.launch
@pytest.mark.parametrize(("on", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_set_so_that_every_reader_agrees(on, precision):
    """torch.compile reads all of these, and warnings are errors here."""
    code = f"""
import torch
from mixreorg_fast.devices import set_tf32
set_tf32({on})
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision == "tf32",
      torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
      torch.backends.cudnn.conv.fp32_precision == "tf32")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [precision, *[str(on)] * 4], done.stderr


@pytest.mark.launch
def test_a_single_process_takes_every_processor_and_a_rank_its_share():
    code = """
import os, torch
from mixreorg_fast.training import distributed
distributed.import_deepspeed = lambda: type("Stub", (), {"init_distributed": lambda *a, **k: None})
distributed.dist.get_rank, distributed.dist.get_world_size = lambda: 0, lambda: 1
os.sched_getaffinity = lambda pid: range(12)
print(distributed.initialise("cpu").device, torch.get_num_threads(), os.environ["DS_ACCELERATOR"])
"""
    ranks = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    for environment, threads in (
        ({}, 12),
        (ranks | {"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "4"}, 3),
        (ranks | {"LOCAL_WORLD_SIZE": "2"}, 6),
    ):
        command = [sys.executable, "-c", code]  # beside a GPU: DeepSpeed follows the device that is asked for
        done = subprocess.run(command, env=disguised(gpus=1) | environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == ["cpu", str(threads), "cpu"], done.stderr
