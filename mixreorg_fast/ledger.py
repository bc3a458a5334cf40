"""Results files: what was measured, on which device, by which command, from which commit.

Every figure that the documentation states stands in one of them; its tables are generated from their rows.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import atomic_path

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@cache
def device_name() -> str:
    """ "NVIDIA H200", or the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def file_stem(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


@cache
def commit() -> str:
    """The checkout's commit, with "+" behind it where files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MIXREORG_COMMIT", "unknown")  # a copy of the tree without its history


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(command: str) -> dict[str, Any]:
    """What stands above the rows of any results file."""
    return {
        "device": device_name(),
        "date": now(),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": command,
    }


def write_rows(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a results file, a row per line, atomically."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    text = json.dumps({**header, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text)


def between_markers(text: str, content: str) -> str:
    """The page `text` with `content` between its two markers; a page without any gets them at its end.

    Raises:
        UserError: it has one of them, or several.
    """
    if BEGIN not in text and END not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"the page must hold {BEGIN} and, after it, {END}, each once")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + "\n\n".join(filter(None, (BEGIN, content, END))) + after
