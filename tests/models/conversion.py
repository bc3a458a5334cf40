"""The command `mixreorg convert`, run and refused."""

from __future__ import annotations

from mixreorg_fast.cli import main


def convert(*arguments) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def refusal(capsys, *arguments) -> str:
    """The one line that a refused conversion ends in."""
    assert main(["convert", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]
