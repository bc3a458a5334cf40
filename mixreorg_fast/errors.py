"""The one exception that a user's mistake raises, and how a command shows it."""

from __future__ import annotations

import argparse
import difflib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input. Its message is one line: the file, key or shape; what was expected; the nearest valid choice.

    Commands print it without a traceback and exit with code 2.
    """


class RankError(UserError):
    """A mistake that concerns one rank alone; the others are raised, with the same text, on every rank."""


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as :class:`UserError` (one line, exit code 2)."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{self.prog}: {message}")


def nearest(word: str, choices: Iterable[str], others: bool = True) -> str:
    """``" (did you mean 'x'?)"`` with the closest of `choices`, or every choice when none is close (unless `others` is
    off, for the files of a folder)."""
    choices = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (choose from: {', '.join(choices)})" if choices and others else ""


def extra(name: str) -> str:
    """How to install what an extra of this project brings; no package index has the project."""
    return f"pip install '.[{name}]' in the checkout of mixreorg_fast"


def run_command(main: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run `main`; print a :class:`UserError` as one line on stderr and return exit code 2; 130 after Ctrl-C.

    Of several ranks only the first prints what all of them raise. With `debug` the traceback is let through. Where the
    reader of the output has gone, as after ``| head``, the command ends quietly with 141, as by SIGPIPE.
    """
    try:
        code = main() or 0
        print(end="", flush=True)  # does nothing where stdout is closed
        return code
    except BrokenPipeError:
        reader = select.poll()
        reader.register(sys.stdout, 0)
        if not any(event & select.POLLERR for _, event in reader.poll(0)):
            raise  # of another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 128 + signal.SIGPIPE
    except (UserError, KeyboardInterrupt) as error:
        if debug:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            line = "interrupted" if interrupted else f"error: {' '.join(str(error).split())}"
            print(line, file=sys.stderr, flush=True)
        return 130 if interrupted else 2
