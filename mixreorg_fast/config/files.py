"""Configuration files: reading, merging, overriding, validating."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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
    """The configuration file at this path, or the packaged one of this name. Raises a UserError if there is neither."""
    path, packaged = Path(name), packaged_configs()
    if not path.is_file() and name not in packaged:
        raise _missing(path, "configuration", packaged)
    return path if path.is_file() else packaged[name]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON configuration, apply ``key.path=value`` overrides (values are JSON, else strings), validate.

    ``"extends": "other.json"`` in a file takes missing values from that file.

    Raises:
        UserError: the file is missing or no JSON object; a key is unknown; a value has the wrong type or does not fit.
    """
    values = _extended(Path(path))
    for override in overrides:
        _apply(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validate a dictionary of values; `source` names it in errors, which are those of :func:`load_config`."""
    return validated(Config, values, source)


def read_object(path: Path, kind: str = "configuration") -> dict[str, Any]:
    """The object in a JSON file. Raises a UserError, in which `kind` says what the file is."""
    try:
        return read_json(path)
    except OSError:
        raise _missing(path, kind) from None


def _missing(path: Path, kind: str, others: Iterable[str] = ()) -> UserError:
    siblings = sorted(map(str, path.parent.glob("*.json")))
    return UserError(f"no {kind} file {path}{nearest(str(path), [*siblings, *others])}")


def _extended(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file, laid over those of the file that its ``"extends"`` names (relative to it)."""
    values = read_object(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must name a configuration file, got {json.dumps(base)}")
    chain = (*extended_by, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise UserError(f"{path}: extends '{base}' leads back to itself")
    return merged(_extended(path.parent / base, chain), values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = merged(base[key], value) if both else value
    return out


def flattened(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Values by path: ``{"train": {"steps": 5}}`` becomes ``{"train.steps": 5}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flattened(value, separator, path + separator) if isinstance(value, Mapping) else {path: value}
    return flat


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
