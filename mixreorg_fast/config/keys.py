"""Print the keys of a configuration with type, default and meaning: all keys, a section's keys, or one key.

mixreorg config                all keys
mixreorg config train          the keys of a section
mixreorg config train.lr       one key
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..errors import UserError, nearest
from .run import Config
from .section import section_of

WIDTH = 112


class Key(NamedTuple):
    name: str
    type: str
    default: str
    meaning: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("key", nargs="?", metavar="SECTION|KEY", help="default: every key")


def main(args: argparse.Namespace) -> int:
    known = list(keys())
    wanted: str = args.key or ""
    chosen = [key for key in known if not wanted or f"{key.name}.".startswith(f"{wanted}.")]
    if not chosen:
        sections = {key.name.rpartition(".")[0] for key in known} - {""}
        raise UserError(f"config: unknown key '{wanted}'{nearest(wanted, [*sections, *(k.name for k in known)])}")
    for key in chosen:
        print(f"{key.name}: {key.type} = {key.default}" if key.default else f"{key.name}: {key.type}")
        print(textwrap.indent(textwrap.fill(key.meaning, WIDTH), "    "))
    return 0


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """The keys of a section and of those within it; ``[]`` marks the entries of a list."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and inner is field.annotation:
            yield from keys(inner, f"{prefix}{name}.")
            continue
        default = "" if field.default is PydanticUndefined else json.dumps(field.default, ensure_ascii=False)
        yield Key(prefix + name, _type(field.annotation), default, field.description or "")
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}[].")


def _type(annotation: Any) -> str:
    """The type in JSON's words."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is typing.Literal:
        return " | ".join(json.dumps(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(part) for part in parts))
    if origin in (list, tuple):
        inner = [_type(part) for part in parts if part is not ...]
        return f"[{', '.join(inner)}{', …' if origin is list or ... in parts else ''}]"
    if origin is dict:
        return "object"
    names = {int: "integer", float: "number", str: "string", bool: "true | false", type(None): "null", Any: "any"}
    return names.get(annotation) or re.sub(r"Config$", "", annotation.__name__)
