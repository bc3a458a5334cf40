"""``mixreorg info``: what can be used, and why not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mixreorg_fast import cli, info, ops
from mixreorg_fast.errors import UserError


def test_every_public_op_is_listed_with_its_implementations(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for op in (*ops.__all__[1:], "MixPlan.sample", "torch", "CUDA", "Triton", "xformers", "DALI", "DeepSpeed"):
        assert op in out
    assert torch.__version__ in out
    assert {name for _, name, _ in info.implementations()} >= {"torch", "triton"}
    assert all(reasons == "yes" for _, name, reasons in info.implementations() if name == "torch")


def test_reasons_are_given(monkeypatch):
    monkeypatch.setattr("mixreorg_fast.ops.dispatch.TRITON_INSTALLED", False)
    rows = {(op, name): text for op, name, text in info.implementations()}
    assert rows["patch_mix", "triton"] == "no: Triton is not installed"


def test_libraries(monkeypatch):
    assert info.library("torch", ("torch",)) == torch.__version__
    assert info.library("no_such.module", ("no-such",)) == "no: not installed"


def test_kernels_need_triton(monkeypatch):
    monkeypatch.setattr(info, "TRITON_INSTALLED", False)
    with pytest.raises(UserError, match=r"Triton is not installed; expected triton >= 3\.6"):
        info.kernel_resources()


def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "mixreorg_fast.info", "--bad"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "unrecognized arguments: --bad" in result.stderr
