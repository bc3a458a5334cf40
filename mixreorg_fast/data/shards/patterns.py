"""Patterns of shards: braces, globs, lists."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError, nearest
from .index import index_places

EXAMPLE = "expected something like 'data/train-{000000..000123}.tar'"
HELP = "; docs/data.md tells how to make shards"


def expand(patterns: str | Sequence[str]) -> list[Path]:
    """Paths that brace patterns (``{000..123}``, ``{a,b}``), globs and comma-separated alternatives stand for.

    The order is that of the patterns; within a glob it is alphabetical. A path named twice counts once. A shard that
    has vanished keeps its place, and so the order of a run, by the index that it left behind.

    Raises:
        UserError: a brace is not closed, a named file is missing, a glob matches nothing, or a pattern is a URL.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths: dict[Path, None] = {}
    missing: list[str] = []
    for name in (name for whole in patterns for pattern in split(whole) for name in braces(pattern)):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", name):
            raise UserError(
                f"{without_secrets(name)}: neither a local path nor hf://, s3:// or https://; copy the shards first "
                f"(such as `gsutil rsync`) or mount the bucket (such as `rclone mount`) and name that path"
            )
        name = os.path.expanduser(name)
        if glob.has_magic(name):
            left = (match.removesuffix(".index") for match in glob.glob(f"{name}.index", recursive=True))
            matches = sorted({*glob.glob(name, recursive=True), *left})
            if not any(map(os.path.isfile, matches)):
                raise UserError(f"no shard matches {name}{_nearby(name)}{HELP}")
            paths.update(dict.fromkeys(map(Path, matches)))
        elif os.path.isfile(name) or any(place.is_file() for place in index_places(Path(name))):
            paths[Path(name)] = None
        else:
            missing.append(name)
    if not missing and not any(map(os.path.isfile, paths)):
        missing = [str(path) for path in paths]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"no shard {missing[0]}{more}{_nearby(missing[0])}{HELP}")
    if not paths:
        raise UserError(f"no shards: the pattern is empty; {EXAMPLE}")
    return list(paths)


def split(pattern: str) -> list[str]:
    """Parts of a pattern between the commas that are outside of braces."""
    parts, depth = [""], 0
    for character in pattern:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            break
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UserError(f"pattern {without_secrets(pattern)}: braces do not match; {EXAMPLE}")
    return [part.strip() for part in parts if part.strip()]


def braces(pattern: str) -> list[str]:
    """A pattern's brace expressions written out; ``{008..011}`` keeps its leading zeros."""
    found = re.search(r"\{([^{}]*)\}", pattern)  # an innermost one
    if not found:
        return [pattern]
    choices = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = map(int, numbers.groups())
        if last < first or last - first >= 10_000_000:
            raise UserError(f"pattern {without_secrets(pattern)}: {found[0]} is not a rising range")
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    elif len(choices) == 1:
        raise UserError(
            f"pattern {without_secrets(pattern)}: {found[0]} is neither a range such as {{000000..000123}} "
            f"nor a list {{a,b}}"
        )
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in braces(before + choice + after)]


def without_secrets(text: str) -> str:
    """A pattern, or a message with URLs, as it may be shown: URLs without user, password and query (signatures).

    A ``?`` of ``hf://`` and ``s3://`` is a glob, unless ``NAME=`` follows.
    """
    return re.sub(r"""(\w+)://([^\s"]*?)(?=,\s*\w+://|[:;.,')]*(?:[\s"]|$))""", _without_secrets, text)


def _without_secrets(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    # A password may contain slashes, as AWS's secrets do. The text after a port number is a path, not a password.
    rest = re.sub(r"^(?:[^/?#]*@|[^/:@]*:(?!\d+(?:/|$)).*@)", "", rest)
    query = r"[?#].*" if scheme.lower() in ("http", "https") else r"\?[\w.%-]+=.*"
    return f"{scheme}://{re.sub(query, '', rest)}"


def _nearby(name: str) -> str:
    """The closest existing tar in the folder of a missing one."""
    folder = os.path.dirname(name) or "."
    siblings = [] if glob.has_magic(folder) else sorted(glob.glob(os.path.join(folder, "*.tar")))
    if len(siblings) > 3:
        return nearest(name, siblings)
    return f" (there are: {', '.join(siblings)})" if siblings else ""
