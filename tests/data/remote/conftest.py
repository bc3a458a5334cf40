"""Shards at local servers, and a small cache that fetches them."""

from __future__ import annotations

import contextlib
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


class Bucket:
    """A bucket of a local S3 server."""

    name = "bucket"

    def __init__(self, url: str, server, client) -> None:
        self.url, self._client, self.stop = url, client, server.stop
        client.create_bucket(Bucket=self.name)

    def put(self, key: str, content: bytes, **options: str) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=content, **options)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """An empty bucket, to whose server AWS's clients of this process and of those it starts are sent."""
    servers, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    requests = pytest.importorskip("requests")
    s3fs = pytest.importorskip("s3fs")
    server = servers.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10)
    s3fs.S3FileSystem.clear_instance_cache()  # a client of the test before has another server
    yield Bucket(f"http://{host}:{port}", server, boto3.client("s3"))
    with contextlib.suppress(Exception):  # the test has stopped it
        server.stop()


@pytest.fixture
def settings(tmp_path: Path):
    """A function from settings to those of a cache in the test's folder."""

    def make(**changed) -> CacheConfig:
        return CacheConfig.model_validate({"folder": str(tmp_path / "remote"), "patience": PATIENCE, **changed})

    return make


@pytest.fixture
def cache(settings):
    return Cache(settings())
