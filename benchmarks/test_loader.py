"""Batches from shards of photos like CC12M's: read, decoded, augmented, captions tokenised, on this device."""

from __future__ import annotations

import functools
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.data.build import Pair, write_shard

from .harness import ON_GPU, Case, Work, matrix

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
    from mixreorg_fast.data.loader import TrainLoader, tokenizer_for

    config, folder = configuration()
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=folder.name):  # where the shards' index goes
        return TrainLoader(config, tokenizer_for(config), micro_batch=BATCH)


def next_batch() -> torch.Tensor:
    return next(batches()).images


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
