"""Tests see neither this checkout's data nor its runs."""

from pathlib import Path

import torch

from mixreorg_fast.devices import choose

ROOT = Path(__file__).parents[1]


def test_the_current_folder_holds_no_data_and_no_runs():
    assert not Path.cwd().is_relative_to(ROOT)
    assert not any(Path(name).exists() for name in ("data", "runs", "docs", "benchmarks"))


def test_what_chooses_a_device_takes_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose() == torch.device("cpu")
