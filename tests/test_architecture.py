"""Imports go from later rooms to earlier ones only, and no file of the product is long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ROOT / "mixreorg_fast"
# The rooms in their order; each lists the modules and packages directly in mixreorg_fast/. The names that the package
# itself offers stand in the room that defines them.
ROOMS = [
    {
        "__init__",
        "__version__",
        "UserError",
        "errors",
        "files",
        "names",
        "images",
        "palette",
        "devices",
        "ranks",
        "config",
        "ledger",
    },
    {"kernels"},
    {"ops"},
    {"models", "accelerate", "data"},
    {"inference", "load"},
    {"evaluation"},
    {"training"},
    {"study"},
    {"cli", "convert", "demo", "export", "info", "resources"},
]
# Neither of these two imports the other.
APART = {("data", "models"), ("models", "data")}
LONGEST = 400
FILES = sorted(path for folder in (PRODUCT, ROOT / "kernels") for path in folder.rglob("*.py"))


def module(path: Path) -> tuple[str, ...]:
    """("mixreorg_fast", "ops", "linear") of a path."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("mixreorg_fast", *parts) if parts[0] == "kernels" else parts


def imports(path: Path) -> list[tuple[str, int]]:
    """First names below mixreorg_fast that a file imports, anywhere in it, with their lines."""
    found = []
    package = module(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [name.name.split(".") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, name.name] for name in node.names]
        else:
            continue
        found += [(name[1], node.lineno) for name in names if name[0] == "mixreorg_fast" and len(name) > 1]
    return found


def room(name: str) -> int:
    numbers = [number for number, names in enumerate(ROOMS) if name in names]
    assert len(numbers) == 1, f"{name} belongs to no room"
    return numbers[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module(path)[1:]))
def test_imports_go_down(path):
    own = module(path)[1]
    if own == "__init__":  # `load`, `ops` and `accelerate` are imported when they are first used
        return
    for name, line in imports(path):
        assert room(name) <= room(own) and (own, name) not in APART, f"{path}:{line} imports {name}"


def test_no_file_is_long():
    others = [path for folder in ("benchmarks", "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in (*FILES, *others) if len(path.read_text().splitlines()) > LONGEST]
