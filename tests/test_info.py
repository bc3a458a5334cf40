"""``mixreorg info``: what can be used, and why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.launch
def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "mixreorg_fast.info", "--bad"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "unrecognized arguments: --bad" in result.stderr


@pytest.mark.launch
def test_an_xformers_that_does_not_load_is_told_with_its_reason(tmp_path):
    """The extension of a build for CUDA 12 beside a PyTorch for CUDA 13."""
    package = tmp_path / "xformers"
    (package / "ops" / "fmha").mkdir(parents=True)
    (package / "ops" / "fmha" / "__init__.py").touch()
    (package / "ops" / "__init__.py").touch()
    (package / "__init__.py").write_text("from . import _cpp_lib")
    (package / "_cpp_lib.py").write_text(
        "import logging\n"
        "_cpp_library_load_exception = RuntimeError('xFormers cannot load its extensions')\n"
        "cause = OSError('libcudart.so.12: cannot open shared object file: No such file or directory')\n"
        "_cpp_library_load_exception.__cause__ = OSError('Could not load this library: _C.so')\n"
        "_cpp_library_load_exception.__cause__.__cause__ = cause\n"
        "logging.getLogger('xformers').warning('many lines')\n"
    )
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    command = [sys.executable, "-m", "mixreorg_fast.info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("attention") and "xformers" in line)
    assert "no: xformers does not load: libcudart.so.12: cannot open shared object file" in line
    assert "many lines" not in done.stdout + done.stderr


@pytest.mark.launch
def test_importing_the_ops_does_not_import_xformers():
    code = "import sys; from mixreorg_fast.ops import attention; sys.exit('xformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
