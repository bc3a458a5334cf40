"""Small photo sets, as a user would bring them, and the shards made of them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.data.reading.loaders import TrainLoader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards.build import build
from mixreorg_fast.data.shards.pair import Pair, write_shard
from mixreorg_fast.data.text.tokenizer import Tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or leaves an index in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def photo(number: int, *, format: str = "JPEG", width: int = 40, height: int = 32) -> bytes:
    """An encoded photo whose pixels depend on `number`."""
    coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(encoded, format)
    return encoded.getvalue()


def bomb() -> bytes:
    """A small PNG that claims 60000 x 60000 pixels, its checksum right."""
    png = bytearray(photo(0, format="PNG"))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def pairs(count: int, first: int = 0) -> list[Pair]:
    """Samples with two captions each; their keys are their numbers."""
    colours = list(COLOURS)
    return [
        Pair(
            f"{number:04d}",
            photo(number, width=40 + number % 7),
            "jpg",
            [f"a {colours[number % 3]} thing number {number}", f"thing {number}"],
            {"nouns": ["thing", colours[number % 3]]} if number % 2 else None,
        )
        for number in range(first, first + count)
    ]


def open_loader(config: Config, tokenizer: Tokenizer, **options) -> TrainLoader:
    """A loader of the training set of `config`."""
    return TrainLoader(config, TrainingSet.open(config), tokenizer, **options)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with images/, captions.tsv and splits/, of 30 photos with two captions each."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    (folder / "splits").mkdir()
    lines = []
    for number in range(30):
        (folder / "images" / f"p{number:02d}.jpg").write_bytes(photo(number))
        lines += [f"p{number:02d}.jpg\tA dog and {number} cats .", f"p{number:02d}.jpg\tanimals in photo {number}"]
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n")
    (folder / "splits" / "train.txt").write_text("".join(f"p{number:02d}\n" for number in range(20)))
    (folder / "splits" / "val.txt").write_text("".join(f"p{number:02d}\n" for number in range(20, 30)))
    return folder


@pytest.fixture
def shards(tmp_path) -> str:
    """Three shards of 13, 10 and 7 samples (not a multiple of any batch), as a pattern."""
    (tmp_path / "shards").mkdir()
    first = 0
    for number, count in enumerate((13, 10, 7)):
        write_shard(tmp_path / "shards" / f"train-{number:06d}.tar", pairs(count, first))
        first += count
    return str(tmp_path / "shards" / "train-{000000..000002}.tar")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train([caption for pair in pairs(30) for caption in pair.captions], 400)


@pytest.fixture
def config(shards):
    """A function from sections (as in a configuration file) to a small configuration that reads `shards`."""

    def make(data: dict | None = None, **sections: dict) -> Config:
        model = {"image_size": 32, "text": {"context": 16}}
        return parse_config({"model": model, "data": {"shards": shards, "threads": 1, **(data or {})}, **sections})

    return make


@pytest.fixture
def built(photos, tmp_path) -> list[Path]:
    """The train split of `photos` as shards of eight."""
    return build(
        photos, f"{tmp_path}/out/train-{{000000..}}.tar", split="train", samples_per_shard=8, progress=False
    ).shards
