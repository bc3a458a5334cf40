"""``python -m mixreorg_fast.training --config FILE``: what train.py runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import Parser, run_command
from . import command


def main(argv: Sequence[str] | None = None, description: str | None = command.__doc__) -> int:
    """Train as the arguments say; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="train.py", description=description)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    command.add_arguments(parser)
    return run_command(lambda: command.main(parser.parse_args(argv)), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
