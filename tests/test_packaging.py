"""``kernels/`` is ``mixreorg_fast.kernels`` from a checkout and from a wheel, and neither needs a build step."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}
LIST = "import pkgutil, mixreorg_fast.kernels as k; print(*(m.name for m in pkgutil.iter_modules(k.__path__)))"


def families_seen_from(folder: Path) -> set[str]:
    # -S: no site-packages, so that an editable install of this checkout cannot stand in.
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {LIST}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_checkout():
    assert (ROOT / "mixreorg_fast" / "kernels").is_symlink()
    assert families_seen_from(ROOT) == FAMILIES


def test_wheel(tmp_path):
    # A copy, so that setuptools leaves its build folders there.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("kernels", "mixreorg_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*command, str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert families_seen_from(tmp_path / "site") == FAMILIES
