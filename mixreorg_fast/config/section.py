"""The base class of all sections of a configuration, and its errors in one line."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError, nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


Schema = TypeVar("Schema", bound=BaseModel)


class Section(BaseModel):
    """Base of all sections: unknown keys and silently converted types are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


def key(default: Any, meaning: str) -> Any:
    """A key of a section. Type checkers see its default, which they do not see in ``Field(default)``."""
    return Field(default, description=meaning)


def validated(schema: type[Schema], values: Mapping[str, Any], source: str) -> Schema:
    """`values` as a `schema`; `source` names them in errors.

    Raises:
        UserError: an unknown key, or a value that does not fit.
    """
    try:
        # JSON has no tuples, so lists are read as tuples; every other conversion ("8" for 8, 1 for true) is refused.
        return schema.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{source}: {describe(error, schema)}") from None


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem pydantic found, with the nearest valid choice."""
    first: dict[str, Any] = {**error.errors()[0]}
    names = [str(part) for part in first["loc"] if not str(part).startswith(":")]  # those are forms, not keys
    key = ".".join(names)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(names[-1], _fields(schema, names[:-1]))}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key}: '{first['input']}' is no valid choice{nearest(first['input'], choices)}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{key}: {message}" if key else message
    message = first["msg"][0].lower() + first["msg"][1:]
    message = f"{message}, got {json.dumps(first['input'], default=str)}"
    return f"{key}: {message}" if key else message


def _fields(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields of the section that `path` leads to."""
    current: Any = schema
    for name in path:
        if name.isdigit():
            continue
        field = current.model_fields.get(name)
        if field is None:
            return []
        current = section_of(field.annotation)
        if current is None:
            return []
    return list(current.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as ``Section``, ``list[Section]`` or ``Section | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := section_of(part))), None)
