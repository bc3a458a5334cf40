"""train.py with faults that strike at a given step, to be started by a launcher: ``-m tests.training.faults_worker``

Its argument is a JSON file: a list of runs, one after the other, each ``{"config": {...}, "faults": {...}}``. A fault
is ``name: step`` or, for those of one rank, ``name: [step, rank]``; steps count from 1.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from mixreorg_fast.config import parse_config
from mixreorg_fast.errors import UserError, run_command
from mixreorg_fast.training import checkpoint
from mixreorg_fast.training.trainer import Trainer, train
from mixreorg_fast.training.watch import launchers

prepared_batch, write_tensors = Trainer._batch, checkpoint.save_file


def inject(faults: dict) -> None:
    """Have `faults` strike in the next run of this process."""

    def struck(name: str, trainer: Trainer) -> bool:
        step, rank = faults.get(name, (0, 0))
        return (trainer.step + 1, trainer.world.rank) == (step, rank)

    def batch(trainer: Trainer, loaded):
        time.sleep(faults.get("slow", 0))
        if struck("kill", trainer):
            os.kill(os.getpid(), signal.SIGKILL)
        if struck("terminate", trainer):
            os.kill(os.getpid(), signal.SIGTERM)
        if struck("kill_launcher", trainer):
            os.kill(launchers()[-1], signal.SIGKILL)
        if struck("hang", trainer):
            time.sleep(60)
        out = prepared_batch(trainer, loaded)
        if trainer.step + 1 in faults.get("nan", []):
            out.images = out.images * torch.nan
        return out

    def save_file(tensors: dict, path: Path) -> None:
        write_tensors(tensors, path)
        step = int(path.parent.name.split("_")[1].split(".")[0])
        if faults.get("kill_saving") == step:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if faults.get("full") == step:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Trainer._batch, checkpoint.save_file = batch, save_file


def main(path: str) -> None:
    torch.set_num_threads(1)
    *others, last = json.loads(Path(path).read_text())
    for run in others:
        inject(run["faults"])
        try:
            train(parse_config(run["config"]))
        except UserError as error:
            print(f"refused: {error}", flush=True)
    inject(last["faults"])
    train(parse_config(last["config"]))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[-1])))
