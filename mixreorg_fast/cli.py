"""``mixreorg COMMAND``: one table of commands, each a module with ``add_arguments(parser)`` and ``main(args)``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from . import __version__
from .errors import Parser, UserError, nearest, run_command

# name -> (module, one line of help); modules load when their command is called, so that `mixreorg` starts at once
# and a missing extra concerns only the command that needs it.
COMMANDS = {
    "info": ("mixreorg_fast.info", "what this installation can use"),
    "train": ("mixreorg_fast.training.command", "pre-train on captioned photos"),
    "config": ("mixreorg_fast.config.keys", "every key of a configuration, its default and meaning"),
    "segment": ("mixreorg_fast.inference.segment", "segment photos by class names"),
    "evaluate": ("mixreorg_fast.evaluation.evaluate", "score weights zero-shot on a dataset"),
    "shards": ("mixreorg_fast.data.commands", "build, verify or join training shards"),
    "data": ("mixreorg_fast.data.remote.command", "fetch public sets of shards"),
    "convert": ("mixreorg_fast.convert", "weights from and to other formats"),
    "export": ("mixreorg_fast.export", "weights as ONNX or PyTorch programs"),
    "push": ("mixreorg_fast.inference.hub", "publish weights on the Hugging Face hub"),
    "study": ("mixreorg_fast.study.command", "train variants on equal budgets and compare them"),
    "demo": ("mixreorg_fast.demo", "a web page that segments photos"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``mixreorg`` command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _dispatch(argv), debug="--debug" in argv)


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: mixreorg COMMAND [options]\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()))
        print("\n`mixreorg COMMAND --help` lists a command's options; --debug shows tracebacks.")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    run, parser = command(argv[0])
    return run(parser.parse_args(argv[1:]))


def command(name: str) -> tuple[Callable[[argparse.Namespace], int | None], Parser]:
    """The function that runs a command, and the parser of its arguments. Raises a UserError for an unknown command."""
    if name not in COMMANDS:
        raise UserError(f"mixreorg: unknown command '{name}'{nearest(name, COMMANDS)}")
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"mixreorg {name}", description=module.__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    module.add_arguments(parser)
    return module.main, parser


if __name__ == "__main__":
    sys.exit(main())
