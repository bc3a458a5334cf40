"""What a checkout and a wheel hold, neither of which needs a build step: kernels, configurations, types."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mixreorg_fast
from mixreorg_fast.errors import UserError

ROOT = Path(__file__).parents[1]
FAMILIES = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}
LIST = "import pkgutil, mixreorg_fast.kernels as k; print(*(m.name for m in pkgutil.iter_modules(k.__path__)))"


def families_seen_from(folder: Path) -> set[str]:
    # -S: no site-packages, so that an editable install of this checkout is not found.
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {LIST}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_checkout():
    assert (ROOT / "mixreorg_fast" / "kernels").is_symlink()
    assert families_seen_from(ROOT) == FAMILIES


@pytest.mark.launch
def test_wheel(tmp_path):
    # A copy, so that setuptools leaves its build folders there.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("configs", "kernels", "mixreorg_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*command, str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    site = tmp_path / "site"
    assert families_seen_from(site) == FAMILIES
    assert (site / "mixreorg_fast" / "py.typed").is_file()
    # Training finds the packaged configurations from any folder, `extends` included.
    code = "from mixreorg_fast.config import *; print(load_config(find_config('groupvit')).model.method)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == "groupvit\n", done.stderr
    command = [sys.executable, "-m", "mixreorg_fast.cli", "train"]
    done = subprocess.run([*command, "zero22"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr == "error: no configuration file zero22 (did you mean 'zero2'?)\n"
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "zero2" in done.stdout and "mixreorg config" in done.stdout and "study" not in done.stdout


@pytest.mark.launch
def test_what_the_package_shows():
    assert {"UserError", "accelerate", "load", "ops"} <= set(
        dir(mixreorg_fast)
    ) and mixreorg_fast.UserError is UserError
    assert (ROOT / "mixreorg_fast" / "py.typed").is_file()
    # Type checkers and editors read imports; they do not run __getattr__.
    tree = ast.parse((ROOT / "mixreorg_fast" / "__init__.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(mixreorg_fast.__all__) <= imported
    missing = "{'load', 'ops', 'accelerate'} - {*dir(mixreorg_fast)}"
    code = f"import sys, mixreorg_fast; print({missing}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set() False\n", done.stderr


def test_no_message_names_a_package_index_that_lacks_the_project():
    for path in (*ROOT.glob("mixreorg_fast/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"):
        assert not re.search(r"pip install '?mixreorg", path.read_text()), path
