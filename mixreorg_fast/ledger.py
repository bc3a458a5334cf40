"""Results files and the Markdown tables made from them, for benchmarks and studies.

A results file says what was measured, on which device, by which command and from which commit.
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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import saving, write_text

Row = Mapping[str, Any]
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
    """A device's name in the form that file names use."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


@cache
def commit() -> str:
    """The checkout's commit, followed by "+" where tracked files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MIXREORG_COMMIT", "unknown")  # a copy of the tree without its history


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(command: str) -> dict[str, Any]:
    """The header of a results file: device, date, commit, versions and command."""
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


def results_files(folder: Path, suites: Collection[str]) -> list[Row]:
    """The results files in `folder` that hold rows of any of these suites."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [file for file in files if any(row["suite"] in suites for row in file["rows"])]


def write_rows(path: Path, header: Row, rows: Iterable[Row], keep: Callable[[Row], bool]) -> None:
    """Write a results file atomically, one row per line: those of the file that `keep` accepts, then `rows`."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    lines = ",\n".join(f"  {json.dumps(row)}" for row in (*filter(keep, old), *rows))
    text = json.dumps({**header, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n"
    write_text(path, text)


def table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def write_page(page: Path, content: str, *, title: str | None = None, check: bool = False) -> bool:
    """Replace the text between the two markers of a Markdown page by `content`.

    A page that does not exist is made, with `title` (default: its file's name) as its heading.

    Returns:
        whether the page changed; with `check`, which leaves the page as it is, whether it would change.
    Raises:
        UserError: as :func:`between_markers`; the page cannot be written.
    """
    old = page.read_text() if page.exists() else None
    text = f"# {title or page.stem.capitalize()}\n" if old is None else old
    try:
        new = between_markers(text, content)
    except UserError as error:
        raise UserError(f"{page}: {error}") from None
    if new != old and not check:
        with saving(page):
            write_text(page, new)
    return new != old


def between_markers(text: str, content: str) -> str:
    """The page `text` with `content` between its two markers. A page without markers gets both at its end.

    Raises:
        UserError: the page has only one marker, a marker twice, or the markers in the wrong order.
    """
    if BEGIN not in text and END not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"the page must hold {BEGIN} and, after it, {END}, each once")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return before + "\n\n".join(filter(None, (BEGIN, content, END))) + after
