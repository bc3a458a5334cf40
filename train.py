#!/usr/bin/env python
"""Pre-train MixReorg (or the GroupViT baseline) on image-text shards, then score it zero-shot.

    deepspeed train.py --config configs/zero2.json                          # every GPU of this machine, or its CPU
    deepspeed --num_gpus 2 train.py --config configs/zero2.json             # two ranks
    deepspeed --hostfile hosts train.py --config configs/cc12m.json         # several machines
    torchrun --nproc_per_node 8 train.py --config configs/cc12m.json
    python train.py --config configs/zero2.json --set train.steps=100       # one process

--set KEY=VALUE changes the configuration from the command line. The same command resumes an interrupted run.
"""

import sys

from mixreorg_fast.training.command import start

if __name__ == "__main__":
    sys.exit(start(description=__doc__))
