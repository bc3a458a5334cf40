"""Configuration files: reading, merging, overriding, validating."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..files import read_json
from .run import Config
from .section import validated


def packaged_configs() -> dict[str, Path]:
    """The run configurations that come with the package, by name."""
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
    return {path.stem: path for path in files if not path.stem.startswith("study")}


def find_config(name: str) -> Path:
    """The configuration file with this path, or the packaged one with this name.

    Raises:
        UserError: neither exists.
    """
    path, packaged = Path(name), packaged_configs()
    if path.is_file():
        return path
    if name in packaged:
        return packaged[name]
    siblings = sorted(map(str, path.parent.glob("*.json"))) if path.parent.is_dir() else []
    raise UserError(f"no configuration file {name}{nearest(name, [*siblings, *packaged])}")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON configuration, apply ``key.path=value`` overrides (values are JSON, else strings), validate.

    ``"extends": "other.json"`` in a file takes missing values from that file.

    Raises:
        UserError: the file is missing or no JSON object; a key is unknown; a value has the wrong type or does not fit.
    """
    values = {} if path is None else _read(Path(path))
    for override in overrides:
        _apply(values, override)
    return parse_config(values, source=str(path) if path is not None else "configuration")


def parse_config(values: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validate a dictionary of values; `source` names it in errors.

    Raises:
        UserError: as :func:`load_config`.
    """
    return validated(Config, values, source)


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file, laid over those of the file that its ``"extends"`` names (relative to it)."""
    try:
        values = read_json(path)
    except OSError:
        siblings = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise UserError(f"no configuration file {path}{nearest(str(path), siblings)}") from None
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must name a configuration file, got {json.dumps(base)}")
    chain = (*extended_by, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise UserError(f"{path}: extends '{base}' leads back to itself")
    return merged(_read(path.parent / base, chain), values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = merged(base[key], value) if both else value
    return out


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, such as train.steps=100")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, last = key.split(".")
    node = values
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {'.'.join(sections[: depth + 1])} is no section")
    node[last] = value
