"""Class names and prompt templates as people write them: one parser for the command line, Python and the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from .errors import UserError, nearest

TEMPLATES = {
    "default": ("a photo of a {}.",),
    # The seven that CLIP's prompt study for ImageNet kept of its eighty (Radford et al., 2021).
    "imagenet7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "name": ("{}",),
}
MASK_CLASSES = 254  # names that a mask of 8 bits holds, beside the background and the value of ignored pixels
# A comma or semicolon at a line's end separates once; so do several line breaks.
_SEPARATOR = re.compile(r"[,;][^\S\n]*\n\s*|[,;]|\n\s*")


def parse_classes(classes: Any, source: str = "classes", most: int | None = None) -> list[str]:
    """Class names as a list, with single spaces inside.

    Args:
        classes: a string, split at commas, semicolons and line breaks; or a list, tuple or array of strings, each of
            which is one name.
        source: what errors call it.
        most: how many names there may be.
    Raises:
        UserError: no names, too many, an empty name, a name given twice (in any case), something that is not text.
    """
    example = 'such as "cat, dog, sofa"'
    if isinstance(classes, str):
        names, given = _SEPARATOR.split(classes.strip()), f"{source} '{' '.join(classes.split())}'"
    else:
        names, given = _strings(classes, f"{source}: expected a string {example} or a list of names"), source
    names = [" ".join(name.split()) for name in names]
    if not names or not all(names):
        found = "an empty name" if names else "no names"
        raise UserError(f"{given}: {found}; expected names separated by commas, {example}")
    seen: dict[str, str] = {}
    for name in names:
        if (key := name.casefold()) in seen:
            same = "" if seen[key] == name else f" (also as '{seen[key]}')"
            raise UserError(f"{given}: '{name}' is named twice{same}")
        seen[key] = name
    if most is not None and len(names) > most:
        raise UserError(f"{source}: {len(names)} classes, at most {most}")
    return names


def read_classes(path: str | Path) -> list[str]:
    """Class names from a text file, one a line; a line that begins with ``#`` is a comment.

    Raises:
        UserError: the file cannot be read, or as :func:`parse_classes`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; a class name per line was expected") from None
    names = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise UserError(f"{path}: no class names; one per line was expected")
    return parse_classes(names, str(path), most=MASK_CLASSES)


def parse_templates(templates: Any) -> tuple[str, ...]:
    """Prompt templates.

    Args:
        templates: the name of a set in `TEMPLATES`, one template (a string with ``{}``), or a list, tuple or array of
            templates.
    Raises:
        UserError: no templates, one without ``{}``, something that is not text.
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if "{}" not in templates:
            raise UserError(
                f"'{templates}' is neither a set of templates nor a template with {{}}{nearest(templates, TEMPLATES)}"
            )
        return (templates,)
    given = tuple(_strings(templates, "expected a template or a list of templates"))
    for template in given:
        if "{}" not in template:
            raise UserError(f"template '{template}' has no {{}} for the class name")
    if not given:
        raise UserError(f"no templates; the usual one is '{TEMPLATES['default'][0]}'")
    return given


def _strings(values: Any, expected: str) -> list[str]:
    """The strings in a list, tuple or array; sets and mappings have no order, and bytes no encoding."""
    if hasattr(values, "tolist"):  # NumPy, pandas
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | Set):
        raise UserError(f"{expected}, got {type(values).__name__}")
    values = list(values)
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{expected}, got {type(value).__name__} at place {place}")
    return values
