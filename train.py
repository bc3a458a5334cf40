#!/usr/bin/env python
"""Pre-train MixReorg (or the GroupViT baseline) on image-text shards, then score it zero-shot.

    deepspeed train.py --config configs/zero2.json                          # every GPU of this machine, or its CPU
    deepspeed --num_gpus 2 train.py --config configs/zero2.json             # two ranks
    deepspeed --hostfile hosts train.py --config configs/cc12m.json         # several machines
    torchrun --nproc_per_node 8 train.py --config configs/cc12m.json
    python train.py --config configs/zero2.json --set train.steps=100       # one process

A running configuration is changed from the command line with --set KEY=VALUE; an interrupted run goes on by itself.
"""

import argparse
import sys

from mixreorg_fast.cli import Parser
from mixreorg_fast.errors import run_command


def main(argv: list[str]) -> None:
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="what to go on from")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(argv)

    from mixreorg_fast.config import load_config

    config = load_config(options.config, options.set)

    from mixreorg_fast.training.trainer import train

    train(config, options.resume)


if __name__ == "__main__":
    code = run_command(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv)
    sys.stdout.flush()
    # Every rank meets the same user error; the launcher is told once everyone has it.
    sys.exit(code)
