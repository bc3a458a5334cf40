"""Shards at local servers, and a small cache that fetches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixreorg_fast.config import CacheConfig
from mixreorg_fast.data.remote.cache import Cache
from mixreorg_fast.data.shards.pair import write_shard
from tests.data.conftest import pairs
from tests.servers.http import WebServer, serving_files

COUNTS = (13, 10, 7, 9)
PATIENCE = 1.5  # seconds; waits between attempts are scaled with it


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Four shards of 13, 10, 7 and 9 samples, by name."""
    folder, first, made = tmp_path_factory.mktemp("tars"), 0, {}
    for number, count in enumerate(COUNTS):
        name = f"train-{number:04d}.tar"
        write_shard(folder / name, pairs(count, first))
        made[name] = (folder / name).read_bytes()
        first += count
    return made


@pytest.fixture
def web(tars: dict[str, bytes]):
    """A web server that has them."""
    with serving_files(tars.get) as server:
        yield server


@pytest.fixture
def pattern(web: WebServer) -> str:
    return f"{web.url}/train-{{0000..0003}}.tar"


@pytest.fixture
def settings(tmp_path: Path):
    """A function from settings to those of a cache in the test's folder."""

    def make(**changed) -> CacheConfig:
        return CacheConfig.model_validate({"folder": str(tmp_path / "remote"), "patience": PATIENCE, **changed})

    return make


@pytest.fixture
def cache(settings):
    return Cache(settings())
