"""Training and reading from shards on a web server of this machine, with latency and a limited rate.

    python -m benchmarks.remote_shards             # both parts; writes benchmarks/results/remote_<device>.json
    python -m benchmarks.remote_shards --part training

training: the share of the time that MixReorg's training waits for data once the first window of shards is here. The
server answers after 50 ms and sends 100 MB/s. The cache holds six of twelve shards, so shards are evicted meanwhile.
streaming: one epoch of 1,000 shards of 100 samples through a cache of 20 shards: how often each sample is read, how
often a shard is fetched, and the memory of the process along the way. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mixreorg_fast import ledger
from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.data.reading.loaders import TrainLoader
from mixreorg_fast.data.reading.samples import SampleReader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards.pair import Pair, write_shard
from mixreorg_fast.models import Batch
from tests.servers.http import serving_files

from . import test_loader, test_train_step
from .harness import RESULTS

LATENCY, RATE = 0.05, 100e6  # seconds; bytes per second
SUITE = "remote"


def large(number: int) -> list[Pair]:
    """Photos of CC12M's sizes."""
    rng = np.random.default_rng(number)
    return [
        Pair(f"{number}_{place}", test_loader.photo(rng), "jpg", ["a photo of a dog near a house"], None)
        for place in range(64)
    ]


def small(number: int) -> list[Pair]:
    """100 samples of an epoch of 1,000 shards, the key of each its number."""
    encoded = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    Image.fromarray(colours).resize((32, 32)).save(encoded, "JPEG")
    return [
        Pair(str(key), encoded.getvalue(), "jpg", [f"a thing of shard {number}"], None)
        for key in range(100 * number, 100 * (number + 1))
    ]


@functools.lru_cache(maxsize=64)
def shard(pairs: Callable[[int], list[Pair]], path: str) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        write_shard(Path(file.name), pairs(int(path[:-4])))
        return Path(file.name).read_bytes()


def serve(pairs: Callable, ready: Any, options: dict) -> None:
    with serving_files(functools.partial(shard, pairs), **options) as server:
        ready.send(server.url)
        ready.recv()
        ready.send(Counter(server.requests))


@contextmanager
def server(pairs: Callable, **options: float) -> Iterator[tuple[str, Callable[[], Counter]]]:
    """A server's address, and a function that ends it and returns its requests."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(pairs, there, options), daemon=True)
    process.start()

    def end() -> Counter:
        here.send("end")
        return here.recv()

    try:
        yield here.recv(), end
    finally:
        process.kill()


def configuration(url: str, shards: int, folder: str, cache: dict, **changes: Any) -> Config:
    data = {"shards": f"{url}/{{0000..{shards - 1:04d}}}.tar", "vocab_size": 300, "threads": 1}
    return parse_config({"data": {**data, "cache": {"folder": folder, **cache}}, **changes})


def training(steps: int, images: int = 8) -> dict[str, Any]:
    model = test_train_step.configuration("mixreorg", torch.float32)
    with tempfile.TemporaryDirectory() as folder, server(large, latency=LATENCY, rate=RATE) as (url, end):
        for number in range(12):  # drawing photos takes longer than sending them
            shard_url(url, number)
        config = configuration(url, 12, folder, {"window": 2, "workers": 2, "size": "20 MB"})
        training_set = TrainingSet.open(config)
        before = time.perf_counter()
        training_set.begin()
        first_window = time.perf_counter() - before
        step = test_train_step.ours(model)
        tokenizer = training_set.train_tokenizer(config.data.vocab_size)
        waited = start = 0.0
        with TrainLoader(config, training_set, tokenizer, micro_batch=images) as loader:
            for number in range(steps + 2):
                if number == 2:  # what is built in the first steps is built
                    start, waited = time.perf_counter(), 0.0
                asked = time.perf_counter()
                batch = next(loader)
                waited += time.perf_counter() - asked
                step(Batch(batch.images, batch.ids, batch.lengths, torch.tensor(number)))
            seconds = time.perf_counter() - start
        held = [path.stat().st_size for path in Path(folder).rglob("*.tar")]
        fetched = sum(end().values()) - 12
    return {
        "op": "training",
        "shape": f"mixreorg {images}x3x224², shards of 64 photos, windows of 2, a cache of 20 MB",
        "mb_per_shard": sum(held) / len(held) / 1e6,
        "first_window_s": first_window,
        "images_per_s": images * steps / seconds,
        "shards_fetched": fetched,
        "shards_evicted": fetched - len(held),
        "waiting": waited / seconds,
    }


def shard_url(url: str, number: int) -> None:
    import urllib.request

    with urllib.request.urlopen(f"{url}/{number:04d}.tar") as answer:
        answer.read()


def streaming(shards: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, server(small) as (url, end):
        size = len(shard(small, "0000.tar"))
        config = configuration(url, shards, folder, {"window": 8, "workers": 2, "size": f"{20 * size} B"})
        training_set = TrainingSet.open(config)
        training_set.begin()
        reader = SampleReader(training_set.shards, 1, torch.device("cpu"))
        ahead = training_set.fetch_ahead(0)
        seen = np.zeros(shards * 100, np.int64)
        memory, held, start = [], 0, time.perf_counter()
        for position in range(0, shards * 100, 50):
            np.add.at(seen, [int(sample.key) for sample in reader.read(training_set.order.at(position, 50))[1]], 1)
            if position % (shards * 10) == 0:
                memory.append(resident())
                held = max(held, sum(path.stat().st_size for path in Path(folder).rglob("*.tar")))
        memory.append(resident())
        seconds = time.perf_counter() - start
        reader.close()
        assert ahead is not None
        ahead.close()
        ahead.release()
        requests = end()
    return {
        "op": "streaming",
        "shape": f"{shards} shards of 100 samples, windows of 8, a cache of 20 shards",
        "samples": int((seen > 0).sum()),
        "read_twice": int((seen > 1).sum()),
        "samples_per_s": shards * 100 / seconds,
        "fetches_per_shard": sum(requests.values()) / shards,
        "shards_held": held / size,
        "mb_after_a_tenth": memory[1],
        "mb_at_the_end": memory[-1],
    }


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("training", "streaming"), help="default: both")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shards", type=int, default=1000)
    options = parser.parse_args()
    parts = {"training": lambda: training(options.steps), "streaming": lambda: streaming(options.shards)}
    rows = []
    for name in (options.part,) if options.part else parts:
        rows.append(
            {"suite": SUITE, **{k: round(v, 4) if isinstance(v, float) else v for k, v in parts[name]().items()}}
        )
        print(rows[-1])
    path = RESULTS / f"remote_{ledger.file_stem(ledger.device_name())}.json"
    header = {**ledger.versions("python -m benchmarks.remote_shards"), "latency_s": LATENCY, "bytes_per_s": RATE}
    measured = {row["op"] for row in rows}
    ledger.write_rows(path, header, rows, keep=lambda row: row["op"] not in measured)


if __name__ == "__main__":
    main()
