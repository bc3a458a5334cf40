"""``python -m mixreorg_fast.training --config FILE``: what train.py runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..cli import Parser
from ..config import load_config
from ..errors import run_command


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Train as the arguments say; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    code = run_command(lambda: _train(argv, description), debug="--debug" in argv)
    sys.stdout.flush()
    if "torch" in sys.modules:
        from .distributed import leave

        leave(code)
    # Every rank meets the same user error; the launcher is told once everyone has it.
    return code


def _train(argv: Sequence[str], description: str | None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train.py", description=description, formatter_class=formatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="what to go on from")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPUs, or the CPU of a machine without")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(argv)
    config = load_config(options.config, options.set)

    from .trainer import train

    train(config, options.resume, options.device)


if __name__ == "__main__":
    sys.exit(main())
