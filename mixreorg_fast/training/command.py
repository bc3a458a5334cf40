"""Pre-train MixReorg (or the GroupViT baseline) on image-text shards, then score it zero-shot.

    mixreorg train zero2                              a configuration that comes with the package, or a file
    mixreorg train own.json --set train.steps=100     another value for a key

`mixreorg config` lists every key. Training uses all GPUs of this machine that CUDA_VISIBLE_DEVICES allows. The same
command again resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from ..config import find_config, load_config, packaged_configs
from ..devices import hidden
from ..errors import Parser, UserError, run_command


def start(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Entry point of train.py and of the launchers; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="train.py", description=description)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    add_arguments(parser)
    return run_command(lambda: main(parser.parse_args(argv)), debug="--debug" in argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(packaged_configs())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "`mixreorg config` lists every key of a configuration."
    parser.add_argument("name", nargs="?", metavar="CONFIG", help=f"a file, or one of: {names}")
    parser.add_argument("--config", metavar="CONFIG", help="the same, as an option")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="what to resume from")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPUs, or the CPU of a machine without")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher passes this option


def main(args: argparse.Namespace) -> int:
    code = run_command(lambda: _train(args), debug=args.debug)
    sys.stdout.flush()
    if "torch" in sys.modules:
        from .distributed import leave

        leave(code)
    return code


def _train(args: argparse.Namespace) -> None:
    name = args.config or args.name
    if name is None or (args.config and args.name):
        raise UserError(f"train: expected one configuration, --config FILE or one of: {', '.join(packaged_configs())}")
    config = load_config(find_config(name), args.set)
    if "RANK" not in os.environ and _gpus(args.device) > 1:
        _launch(args, name)
        return
    from .trainer import train

    train(config, args.resume, args.device)


def _gpus(device: str | None) -> int:
    """The number of GPUs to train on; 0: the CPU."""
    if device == "cpu" or hidden():
        return 0
    import torch

    return torch.cuda.device_count()


def _launch(args: argparse.Namespace, name: str) -> None:
    """Start a rank on each GPU with DeepSpeed's launcher, without its messages."""
    from .distributed import import_deepspeed

    import_deepspeed()
    from deepspeed.launcher.runner import main as launch

    # A terminal sends Ctrl-C to the ranks as well. They write a checkpoint and end, and then this process does.
    signal.signal(signal.SIGINT, lambda *_: None)
    options = [word for value in args.set for word in ("--set", value)] + ["--resume", args.resume]
    options += ["--device", args.device] if args.device else []
    options += ["--debug"] if args.debug else []
    launch(["--quiet", "--module", "mixreorg_fast.training.command", "--config", name, *options])


if __name__ == "__main__":
    sys.exit(start())
