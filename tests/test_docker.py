"""The Dockerfile, step by step: its sources exist, its packages are Debian's, its `make` installs what a GPU needs."""

import fnmatch
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from string import Template

import pytest

from tests.test_makefile import ROOT, machine  # noqa: F401  a fixture


def steps() -> list[tuple[str, str]]:
    """Instructions and their arguments, comments left out and lines joined, with the ARGs' defaults filled in."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found, values = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, rest = line.split(maxsplit=1)
        if name == "ARG":
            values |= [rest.split("=", 1)]
        found.append((name, Template(rest).safe_substitute(values)))
    return found


def commands() -> list[list[str]]:
    return [shlex.split(part) for name, rest in steps() if name == "RUN" for part in rest.split("&&")]


def sent(path: str) -> bool:
    """Whether .dockerignore, whose patterns begin at its folder, lets `path` into the build."""
    rules = [line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    parts = [path, *map(str, Path(path).parents)]
    return not any(fnmatch.fnmatch(part, rule.replace("**/", "*/")) for part in parts for rule in rules if rule)


def test_steps_are_known_and_start_from_the_makefiles_cuda():
    names = [name for name, _ in steps()]
    assert set(names) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"} and names.count("FROM") == 1
    (image,) = (rest for name, rest in steps() if name == "FROM")
    (cuda,) = (rest for name, rest in steps() if name == "ARG" and rest.startswith("CUDA="))
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-(base|runtime)-ubuntu\d\d\.04", image) and cuda == "CUDA=13"
    assert "PINS   := $(if $(filter 12,$(CUDA))" in (ROOT / "Makefile").read_text()


def test_everything_that_git_tracks_is_copied_and_nothing_else():
    assert [rest for name, rest in steps() if name == "COPY"] == [". ."]
    for folder in (".venv/bin/python", "data/cc3m/a.tar", "runs/scenes/a.json", ".git/HEAD", "a/__pycache__/b.pyc"):
        assert not sent(folder), folder
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert [path for path in tracked.stdout.splitlines() if not sent(path)] == []


def test_commands_are_debians():
    installed = next(command for command in commands() if command[:2] == ["apt-get", "install"])
    packages = [word for word in installed[2:] if not word.startswith("-")]
    assert {command[0] for command in commands()} <= {"apt-get", "rm", *packages}
    if not shutil.which("apt-cache"):
        pytest.skip("apt-cache is not installed")
    known = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True).stdout.split()
    if "make" not in known:
        pytest.skip("apt has no lists")
    assert set(packages) <= set(known)


def test_make_installs_for_a_gpu_that_it_does_not_see(machine):  # noqa: F811
    (make,) = (command for command in commands() if command[0] == "make")
    image = machine("compiler", "headers")  # and no nvidia-smi
    done = image.make(*make[1:])
    assert done.returncode == 0, done.stderr
    torch, rest = image.installed()
    assert "-c constraints.txt torch==" in torch and re.search(r"\.\[train,.*,gpu\]", rest)
    image = image.make(*[word.replace("CUDA=13", "CUDA=12") for word in make[1:]])
    assert image.returncode == 0, image.stderr


def test_the_last_command_is_ours():
    (environment,) = (rest for name, rest in steps() if name == "ENV")
    assert environment.startswith("PATH=/opt/mixreorg_fast/.venv/bin:")  # where `make env` puts it, in the WORKDIR
    assert [rest for name, rest in steps() if name == "WORKDIR"] == ["/opt/mixreorg_fast", "/app"]
    assert steps()[-1] == ("CMD", '["mixreorg", "info"]')
