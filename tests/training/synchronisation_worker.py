"""Where the trainer's loop would wait for a GPU: ``torchrun --nproc_per_node 2 -m … FILE``

FILE receives, for each case, the places that :mod:`tests.synchronisations` finds in one of its steps:
``{"micro-step": [...], "optimizer step": [...]}``. DeepSpeed's timers begin with the third step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from mixreorg_fast.config import merged
from mixreorg_fast.data.reading.loaders import Pairs
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.models import text_encoder
from mixreorg_fast.training.data import BadSamples
from mixreorg_fast.training.distributed import initialise
from mixreorg_fast.training.trainer import Trainer
from mixreorg_fast.training.watch import StopRequest
from tests.synchronisations import Synchronisations
from tests.tiny import random_batch, tiny_config

STEPS, RECORDED, ACCUMULATION = 4, 3, 2
CASES = {
    **{f"zero{stage}": {"deepspeed": {"zero_stage": stage}} for stage in (0, 1, 2)},
    "zero2, grad cache": {"train": {"grad_cache": True}, "deepspeed": {"zero_stage": 2}},
}


class Phases:
    """In place of the watch: which phase of which step the loop is in."""

    step, phase = 0, "micro-step"

    def at(self, step: int, place: str, *, timed: bool = True) -> None:
        self.step, self.phase = step, place if place == "optimizer step" else "micro-step"


class TrainingSet:
    """In place of the training set: there are no shards."""

    digest, is_remote = "", False

    def __len__(self) -> int:
        return 10**6


class Loader:
    """In place of the loader: batches that lie on the GPU."""

    bad_samples = ()

    def __init__(self, trainer: Trainer, synchronisations: Synchronisations) -> None:
        self._batches = []
        for number in range(STEPS * ACCUMULATION):
            position = (number * trainer.ranks.size + trainer.ranks.rank) * trainer.micro_batch
            made = random_batch(trainer.config, trainer.micro_batch, seed=number, nouns=2)
            synchronisations.to_gpu(made.images, made.ids, made.noun_ids)
            pairs = Pairs(made.images, made.ids, made.lengths, position, [], made.noun_ids, made.noun_lengths)
            self._batches.append(pairs)

    def __iter__(self) -> Iterator[Pairs]:
        return iter(self._batches)


def run(case: dict, ranks, folder: Path) -> dict[str, list[str]]:
    base = {
        "model": {"drop_path": 0.3},
        "mixing": {"group_size": 2, "context_share": 0.5},
        "loss": {"multi_label": 0.5, "mixed_negatives": "attributed"},
        "train": {"batch": 4 * ACCUMULATION * ranks.size, "accumulation": ACCUMULATION, "steps": STEPS},
        "output": str(folder),
    }
    config = tiny_config(**merged(base, case))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.train(["a"], 300).save(config.run_folder)
    phases, found = Phases(), {"micro-step": [], "optimizer step": []}

    def record(place: str) -> None:
        if phases.step == RECORDED:
            found[phases.phase].append(place)

    def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copy = tensor.clone()
        synchronisations.to_gpu(copy)
        return copy

    synchronisations = Synchronisations(record)
    for name, loaded in list(sys.modules.items()):  # modules import it by name
        if name.startswith("mixreorg_fast") and "upload" in vars(loaded):
            loaded.upload = uploaded
    get_accelerator().synchronize = lambda *device: synchronisations.waits()
    with synchronisations.recorded(), StopRequest() as stop:
        trainer = Trainer(config, TrainingSet(), ranks, phases, {})
        trainer._save = lambda: None
        trainer._loop(Loader(trainer, synchronisations), stop)
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    text_encoder.BUCKETED = {"cpu"}
    BadSamples.count = lambda *_: 0
    with tempfile.TemporaryDirectory() as folder:
        ranks = initialise()
        found = {name: run(case, ranks, Path(folder)) for name, case in CASES.items()}
    if ranks.is_main:
        Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
