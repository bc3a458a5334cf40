"""``benchmarks/on_gpu.sh``, with a Python that notes how it is called."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mixreorg_fast.config import load_config
from tests.disguise import executable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout of the script alone, whose environment holds a Python that fails without CUDA graphs."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "on_gpu.sh", tmp_path / "benchmarks")
    note = f'echo "$*" >> {tmp_path}/calls; case "$*" in *cuda_graphs*) exit 3 ;; esac'
    executable(tmp_path / ".venv" / "bin" / "python", note)
    return tmp_path


def on_gpu(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(checkout / "benchmarks" / "on_gpu.sh"), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHON")}
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60)


def test_settings_overrule_and_each_command_has_its_own_exit_code(checkout):
    done = on_gpu(checkout, "train", "train.steps=7", "train.batch=64")
    calls = [line for line in (checkout / "calls").read_text().splitlines() if "train.py" in line]
    assert len(calls) == 4
    for call in calls:
        values = dict(pair.split("=", 1) for pair in call.split() if "=" in pair)  # the last one counts
        # Raises for settings that training refuses.
        load_config(ROOT / "configs" / "zero2.json", re.findall(r"--set (\S+)", call))
        assert (values["train.steps"], values["train.batch"], values["train.precision"]) == ("7", "64", "bf16")
    codes = [line.rsplit(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("= ")]
    assert codes == ["0", "3", "0", "0"]
    assert done.returncode == 3


def test_another_python(checkout):
    other = executable(checkout / "bin" / "other", f'echo "$*" > {checkout}/others')
    assert on_gpu(checkout, "tests", "-x", PYTHON=str(other)).returncode == 0
    assert (checkout / "others").read_text().split()[:2] == ["-m", "pytest"]
    assert not (checkout / "calls").exists()


def test_an_unknown_part(checkout):
    done = on_gpu(checkout, "trian")
    assert done.returncode == 2 and "no part 'trian'" in done.stderr


@pytest.mark.parametrize("part", ["tests", "memcheck", "warm", "step", "rest"])
def test_every_file_exists(checkout, part):
    executable(checkout / "bin" / "compute-sanitizer", f'echo "$*" >> {checkout}/calls')
    on_gpu(checkout, part, PATH=f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}")
    named = re.findall(r"\b(?:tests|benchmarks)/\S*", (checkout / "calls").read_text())
    assert named and not [path for path in named if not _exists(*path.split("::"))]


def _exists(file: str, test: str = "") -> bool:
    return (ROOT / file).exists() and (not test or f"def {test}(" in (ROOT / file).read_text())
