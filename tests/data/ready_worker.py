"""One rank of two that make shards ready together: a folder as argument, its environment as deepspeed sets it."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from mixreorg_fast.config import parse_config
from mixreorg_fast.data.reading.loaders import TrainLoader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.ranks import Ranks
from mixreorg_fast.training import data


def main(folder: Path) -> None:
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=ranks.rank, world_size=ranks.size)
    model = {"image_size": 32, "text": {"context": 16}}
    settings = {"shards": f"{folder}/*.tar", "threads": 1, "max_bad": 0.5, "augment": {"rand_augment_ops": 0}}
    config = parse_config({"model": model, "data": settings, "output": str(folder)})
    told = {}

    data.NETWORK_DISK = 1.0
    data.SLICE = 0.1  # many exchanges, in which the faster rank waits for the slower
    verifying, told["verified"] = data.verifying, []

    def slowly(path, decoder):
        told["verified"].append(path.name)
        for read in verifying(path, decoder):
            time.sleep(0.3 * ranks.rank)
            yield read

    waiting, told["waited"] = data._wait_for_files, []
    data._wait_for_files = lambda *arguments: told["waited"].append(waiting(*arguments))
    data.verifying = slowly
    data.open_training_set(config, ranks)
    data.verifying = None  # they are ready now
    training_set = data.open_training_set(config, ranks)
    told["samples"], told["lost"] = len(training_set), training_set.lost

    # Both ranks find samples that go bad afterwards, and have the same account of them.
    for path in sorted(folder.glob("*.tar"))[:1]:
        dist.barrier()
        if ranks.rank == 0:
            path.rename(path.with_suffix(".away"))
        dist.barrier()
    account = data.BadSamples(config, ranks, training_set, 0)
    tokenizer = Tokenizer.train(["a thing"], 300)
    with TrainLoader(config, training_set, tokenizer, micro_batch=8, rank=ranks.rank, world_size=2) as loader:
        for _ in range(3):
            next(loader)
        dist.barrier()
        told["bad"] = account.count(loader.bad_samples)

    # A rank whose shards are not those of the others is found out, on every rank.
    if ranks.rank == 1:
        os.environ["XDG_CACHE_HOME"] = str(folder / "other")
        last = parse_config({"data": {"shards": str(sorted(folder.glob("*.tar"))[-1])}})
        data.TrainingSet = SimpleNamespace(open=lambda config, warn: TrainingSet.open(last))
    try:
        data.open_training_set(config, ranks)
    except UserError as error:
        told["refusal"] = str(error)

    # So is a rank that has no shards.
    def absent(config, warn):
        raise UserError("no shard a.tar")

    if ranks.rank == 1:
        data.TrainingSet = SimpleNamespace(open=absent)
    try:
        data.open_training_set(config, ranks)
    except UserError as error:
        told["absence"] = str(error)
    data.verifying = verifying

    # What cannot be read on one rank's share ends all of them.
    def fail(paths, config, ranks):
        if ranks.rank == 1:
            raise UserError("the disk of rank 1")
        yield 1

    data._index, data.is_ready = fail, lambda *_, **__: False
    try:
        data.open_training_set(config, ranks)
    except UserError as error:
        told["failure"] = str(error)
    (folder / f"told_{ranks.rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
