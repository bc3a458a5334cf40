"""train.py with faults that strike at a given step, to be started by a launcher: ``-m tests.training.faults_worker``

Its argument is a JSON file: a list of runs, one after the other, each ``{"config": {...}, "faults": {...}}``. A fault
is ``name: step`` or, for those of one rank, ``name: [step, rank]``; steps count from 1.

"full" pretends that the disk is full, "fill" fills the one that the run folder is on. "impatient: seconds" is how long
collectives wait when the run begins, "prepare: seconds" how long rank 0 prepares it.
"""

import errno
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mixreorg_fast.config import parse_config
from mixreorg_fast.errors import UserError, run_command
from mixreorg_fast.models import MixReorg
from mixreorg_fast.training import checkpoint, preparation
from mixreorg_fast.training.distributed import leave
from mixreorg_fast.training.trainer import Trainer, train
from mixreorg_fast.training.watch import launchers

prepared_batch, write_tensors, losses_of, prepare = (
    Trainer._batch,
    checkpoint.save_file,
    MixReorg.losses,
    preparation.prepare,
)
BALLAST = "ballast"


def inject(faults: dict) -> None:
    """Have `faults` strike in the next run of this process."""

    def struck(name: str, trainer: Trainer) -> bool:
        step, rank = faults.get(name, (0, 0))
        return (trainer.step + 1, trainer.ranks.rank) == (step, rank)

    step = 0

    def batch(trainer: Trainer, loaded):
        nonlocal step
        step = trainer.step + 1
        seconds, rank = faults.get("slow", (0, 0))
        if trainer.ranks.rank == rank:
            time.sleep(seconds)
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

    def losses(*arguments) -> dict:
        if faults.get("memory") == [step, int(os.environ["RANK"])]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        out = losses_of(*arguments)
        return out | {"loss": out["loss"] * (1e6 if step in faults.get("spike", []) else 1.0)}

    def save_file(tensors: dict, path: Path) -> None:
        if faults.get("fill") == step:
            free = os.statvfs(path.parent)
            (path.parents[3] / BALLAST).write_bytes(bytes(free.f_bavail * free.f_frsize - 60_000))
        write_tensors(tensors, path)
        if faults.get("kill_saving") == step:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if faults.get("full") == step:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def slowly_prepared(*arguments, **options):
        time.sleep(faults.get("prepare", 0))
        return prepare(*arguments, **options)

    if "impatient" in faults:
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=faults["impatient"]), group)
    Trainer._batch, checkpoint.save_file, MixReorg.losses, preparation.prepare = (
        batch,
        save_file,
        losses,
        slowly_prepared,
    )


def main(path: str) -> None:
    torch.set_num_threads(1)
    *others, last = json.loads(Path(path).read_text())
    for run in others:
        inject(run["faults"])
        config = parse_config(run["config"])
        try:
            train(config)
        except UserError as error:
            print(f"refused: {error}", flush=True)
        (config.run_folder.parent / BALLAST).unlink(missing_ok=True)
    inject(last["faults"])
    train(parse_config(last["config"]))


if __name__ == "__main__":
    code = run_command(lambda: main(sys.argv[-1]))
    leave(code)
    sys.exit(code)
