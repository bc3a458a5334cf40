"""The base class of all sections of a configuration, its keys, and its errors in one line."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError, nearest

Schema = TypeVar("Schema", bound="Section")

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys and silently converted types are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    def problems(self) -> Iterator[str]:
        """What does not fit together in this section, each in one sentence."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self: Schema) -> Schema:
        if found := list(self.problems()):
            raise ValueError("; ".join(found))
        return self


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A key of a section. Type checkers see its default, which they do not see in ``Field(default)``."""
    return Field(default, description=meaning, **bounds)


def validated(schema: type[Schema], values: Mapping[str, Any], source: str) -> Schema:
    """The section described by `values`, as read from JSON. Raises a UserError that begins with `source`."""
    try:
        # JSON has no tuples, so lists are read as tuples; every other conversion ("8" for 8, 1 for true) is refused.
        return schema.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{source}: {describe(error, schema)}") from None


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem pydantic found, with the nearest valid choice or the meaning of the key."""
    first: dict[str, Any] = {**error.errors()[0]}
    names = [str(part) for part in first["loc"] if not str(part).startswith(":")]  # those are forms, not keys
    key = ".".join(names)
    prefix = f"{key}: " if key else ""
    known = {entry.name: entry.meaning for entry in keys(schema)}
    listed = re.sub(r"\.\d+\b", "[]", key)
    if first["type"] == "extra_forbidden":
        section = listed.rpartition(".")[0]
        inside = (re.match(rf"{re.escape(section and section + '.')}(\w+)", name) for name in known)
        return f"unknown key '{key}'{nearest(names[-1], dict.fromkeys(found[1] for found in inside if found))}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key}: '{first['input']}' is not a valid choice{nearest(first['input'], choices)}"
    if first["type"] == "value_error":
        return f"{prefix}{first['ctx']['error']}"
    meaning = known.get(listed.removesuffix("[]"))
    text = f"{prefix}{first['msg'][0].lower()}{first['msg'][1:]}, got {json.dumps(first['input'], default=str)}"
    return f"{text} ({meaning})" if meaning else text


class Key(NamedTuple):
    name: str
    type: str
    default: str
    meaning: str


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of a section and of those within it; ``[]`` marks the entries of a list."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and inner is field.annotation:
            yield from keys(inner, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else json.dumps(field.default, ensure_ascii=False)
        yield Key(prefix + name, _type(field.annotation), default, field.description or "")
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}[].")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as ``Section``, ``list[Section]`` or ``Section | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := section_of(part))), None)


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
    return names.get(annotation) or annotation.__name__.removesuffix("Config")
