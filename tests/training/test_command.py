"""``mixreorg train``: what it takes, and how it starts ranks."""

import sys
from types import ModuleType

import pytest
import torch

from mixreorg_fast.cli import main
from mixreorg_fast.training import command

pytest.importorskip("deepspeed")


def test_several_gpus_get_a_rank_each(monkeypatch):
    """By DeepSpeed's launcher, which hands all options on."""
    import deepspeed.launcher.runner as runner

    for name in ("RANK", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runner, "main", calls.append)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert main(["train", "zero2", "--set", "train.steps=3", "--resume", "never", "--device", "cuda"]) == 0
    options = ["--set", "train.steps=3", "--resume", "never", "--device", "cuda"]
    assert calls == [["--quiet", "--module", "mixreorg_fast.training.command", "--config", "zero2", *options]]
    assert runner.parse_args(calls[0]).user_args == ["--config", "zero2", *options]
    assert command._gpus("cpu") == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command._gpus(None) == 0


def test_one_configuration_is_named(capsys):
    for words in (["train"], ["train", "zero2", "--config", "zero1"]):
        assert main(words) == 2
        assert "expected one configuration, --config FILE or one of: cc12m, " in capsys.readouterr().err


def test_python_m_takes_names_too(monkeypatch):
    found = []
    trainer = ModuleType("trainer")
    trainer.train = lambda config, resume, device: found.append((config.name, resume, device))
    monkeypatch.setitem(sys.modules, "mixreorg_fast.training.trainer", trainer)
    monkeypatch.setattr("mixreorg_fast.training.distributed.leave", lambda code: None)
    assert command.start(["--local_rank=0", "--config", "groupvit", "--device", "cpu"]) == 0
    assert found == [("scenes_groupvit", "auto", "cpu")]
