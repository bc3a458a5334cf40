"""Batches from shards of photos like CC12M's: read, decoded, augmented, captions tokenised, on this device."""

from __future__ import annotations

import functools
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.data.reading.loaders import TrainLoader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards.pair import Pair, write_shard
from mixreorg_fast.models import Batch

from . import test_train_step
from .harness import DEVICE, DTYPE, ON_GPU, Case, Work, matrix, synchronized_time
from .report import WAITING

pytest.importorskip("nvidia.dali", reason="needs DALI")
BATCH, SHARDS, PHOTOS = (512, 8, 512) if ON_GPU else (64, 2, 64)  # images a batch, shards, photos in each
WORDS = ("a", "photo", "of", "the", "red", "small", "old", "dog", "cat", "house", "tree", "street", "near", "water")


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG of CC12M's sizes, short side 256 to 512, about as detailed as a photo: noise of falling amplitude."""
    short = int(rng.integers(256, 513))
    width, height = rng.permutation([short, int(short * rng.uniform(1.0, 1.6))]).tolist()
    pixels = np.zeros((height, width, 3), np.float32)
    for side, amplitude in ((4, 60), (16, 30), (64, 15)):
        noise = (rng.normal(0, amplitude, (side, side, 3)) + 128).clip(0, 255).astype(np.uint8)
        resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(resized, np.float32) - 128
    pixels += rng.normal(0, 4, pixels.shape) + 128
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


@functools.cache
def configuration() -> tuple[Config, tempfile.TemporaryDirectory]:
    """The paper's input size and augmentation on shards of its own; the folder lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="mixreorg-benchmark-")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        pairs = (
            Pair(f"{shard}{number:05d}", photo(rng), "jpg", [" ".join(rng.choice(WORDS, rng.integers(8, 20)))], None)
            for number in range(PHOTOS)
        )
        write_shard(Path(folder.name) / f"train-{shard:06d}.tar", pairs)
    data = {"shards": f"{folder.name}/train-*.tar", "vocab_size": 400, "threads": min(16, os.cpu_count() or 1)}
    return parse_config({"data": data}), folder


@functools.cache
def batches() -> Iterator:
    config, folder = configuration()
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=folder.name):  # where the shards' index goes
        return loader(config, BATCH)


def loader(config: Config, images: int) -> TrainLoader:
    """Batches of so many images with a tokenizer of their captions."""
    training_set = TrainingSet.open(config)
    return TrainLoader(config, training_set, training_set.train_tokenizer(config.data.vocab_size), micro_batch=images)


def next_batch() -> torch.Tensor:
    return next(batches()).images


def test_waiting(record):
    """The share of a training's time that it waits for data; the loader prepares batches while the step computes."""
    images, steps = (512, 30) if ON_GPU else (8, 6)
    config = test_train_step.configuration("mixreorg", DTYPE)

    def train() -> tuple[float, float]:
        data, folder = configuration()
        step = test_train_step.ours(config)
        with (
            mock.patch.dict(os.environ, XDG_CACHE_HOME=folder.name),
            loader(data, images) as pairs,
        ):
            waited = 0.0
            for number in range(steps + 3):
                if number == 3:  # compiled and warm
                    start, waited = synchronized_time(), 0.0
                before = time.perf_counter()
                batch = next(pairs)
                waited += time.perf_counter() - before
                step(Batch(batch.images, batch.ids, batch.lengths, torch.tensor(number, device=DEVICE)))
            return waited, synchronized_time() - start

    waited, seconds = record.once(train)
    record(
        suite="loader",
        op=WAITING,
        shape=f"mixreorg {images}x3x224²",
        dtype=str(DTYPE).removeprefix("torch."),
        implementation="ours",
        images_per_s=images * steps / seconds,
        waiting=waited / seconds,
    )


CASE = Case(
    suite="loader",
    op="loader",
    shape=f"{BATCH}x3x224²",
    batch=BATCH,
    dtype=torch.float32,
    inputs=lambda generator: (),
    implementations={"ours": next_batch},
    work={"step": Work()},
    modes=("step",),
)


@matrix([CASE])
def test_loader(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
