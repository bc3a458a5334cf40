"""Whole shards come from real servers, whatever the connection does; nothing half-read is ever taken for one."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import resource
import subprocess
import threading
import time

import pytest

from mixreorg_fast.data.remote.cache import Cache
from mixreorg_fast.data.remote.sets import remote_shards
from mixreorg_fast.data.remote.sources import RemoteShard, list_shards
from mixreorg_fast.data.shards.patterns import expand, without_secrets
from mixreorg_fast.errors import UserError

from .conftest import COUNTS, PATIENCE

NAME = "train-0000.tar"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def from_web(web, tars, name=NAME, **known) -> RemoteShard:
    return RemoteShard(f"{web.url}/{name}", **known)


def test_a_shard_is_fetched_verified_and_kept(web, tars, cache, settings):
    shard = from_web(web, tars)
    got = cache.get(shard)
    assert got.verified and len(got.samples) == COUNTS[0] and got.path.read_bytes() == tars[NAME]
    assert [path.name for path in got.path.parent.iterdir() if "partial" in path.name or "etag" in path.name] == []
    asked = len(web.requests)
    web.stop()
    assert len(Cache(settings()).get(shard).samples) == COUNTS[0] and len(web.requests) == asked


@pytest.mark.parametrize("known", (False, True), ids=("by its ETag", "by its checksum"))
def test_a_cut_connection_goes_on_where_it_ended(web, tars, cache, known):
    web.fail(f"/{NAME}", cut=3000, times=2)
    options = {"size": len(tars[NAME]), "checksum": sha256(tars[NAME]), "version": "1"} if known else {}
    got = cache.get(from_web(web, tars, **options))
    assert got.path.read_bytes() == tars[NAME] and len(web.requests) == 3


def test_a_process_that_was_killed_goes_on(web, tars, cache):
    shard = from_web(web, tars, size=len(tars[NAME]), checksum=sha256(tars[NAME]), version="1")
    partial = cache.path(shard).with_name(f".{cache.path(shard).name}.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(tars[NAME][:5000])
    web.fail(f"/{NAME}", content=b"x" * 5000 + tars[NAME][5000:])  # what is here is not asked for again
    assert cache.get(shard).path.read_bytes() == tars[NAME] and not partial.exists()


def test_a_file_that_changed_meanwhile_starts_again(web, tars, cache):
    other = tars["train-0001.tar"]
    web.fail(f"/{NAME}", cut=3000)
    content = web.content

    def changed(path):
        web.content = lambda path: other
        return content(path)

    web.content = changed
    assert cache.get(from_web(web, tars)).path.read_bytes() == other


@pytest.mark.parametrize(
    "fault",
    ({"status": 503}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "0.4"}}, {"truncate": 2000}),
    ids=("503", "500", "429", "truncated"),
)
def test_faults_that_pass(web, tars, cache, fault):
    web.fail(f"/{NAME}", **fault)
    start = time.monotonic()
    got = cache.get(from_web(web, tars, checksum=sha256(tars[NAME]), size=len(tars[NAME]), version="1"))
    assert got.path.read_bytes() == tars[NAME]
    assert time.monotonic() - start > (0.4 if fault.get("status") == 429 else 0)


def test_an_etag_of_an_encrypted_object_is_not_its_md5(web, tars, cache):
    web.headers = {"x-amz-server-side-encryption": "aws:kms"}
    shard = from_web(web, tars, checksum=f"md5:{'0' * 32}", size=len(tars[NAME]), version="0" * 32)
    assert cache.get(shard).path.read_bytes() == tars[NAME] and len(web.requests) == 1


def test_a_wrong_checksum_is_fetched_again_then_refused(web, tars, cache):
    wrong = tars[NAME][::-1]
    shard = from_web(web, tars, checksum=sha256(tars[NAME]), size=len(tars[NAME]), version="1")
    web.fail(f"/{NAME}", content=wrong, times=1)
    assert cache.get(shard).path.read_bytes() == tars[NAME]
    cache.path(shard).unlink()
    web.fail(f"/{NAME}", content=wrong, times=None)
    with pytest.raises(UserError, match="another checksum"):
        cache.get(shard)
    assert not cache.path(shard).exists() and not list(cache.folder.rglob("*.partial"))


def test_a_server_that_is_gone(web, tars, cache, caplog):
    shard = from_web(web, tars)
    web.stop()
    threading.Timer(PATIENCE / 2, web.start).start()
    with caplog.at_level(logging.WARNING):
        assert cache.get(shard).path.read_bytes() == tars[NAME]
    assert "trying again" in caplog.text
    web.stop()
    with pytest.raises(UserError, match="refused.*data.cache.patience"):
        cache.get(from_web(web, tars, "train-0001.tar"))


def test_what_cannot_be_had_is_refused_at_once(web, tars, cache):
    for name, status, said in (("no.tar", None, "404 Not Found"), (NAME, 403, "403 Forbidden")):
        if status:
            web.fail(f"/{name}", status=status)
        with pytest.raises(UserError, match=f"{name}: {said}"):
            cache.get(from_web(web, tars, name))
    for pattern, said in (
        (f"{web.url}/train-*.tar", "lists no files"),
        ("https://me:secret@host/a.tar", "netrc"),
        ("hf://datasets/owner/a.tar", "expected hf://datasets/OWNER/NAME/PATTERN"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            list_shards(pattern, cache.folder / "listings")
        assert "secret" not in str(refusal.value)


def test_a_login_of_netrc_is_sent(web, tars, cache, tmp_path, monkeypatch):
    web.login = f"Basic {base64.b64encode(b'me:SECRET').decode()}"
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="401"):
        cache.get(from_web(web, tars))
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password SECRET")
    netrc.chmod(0o600)
    assert len(cache.get(from_web(web, tars)).samples) == COUNTS[0]


@pytest.mark.parametrize(
    "secret, shown",
    (
        ("https://host/a.tar?X-Amz-Signature=SECRET&b=c", "https://host/a.tar"),
        ("https://me:SECRET@host:80/a.tar", "https://host:80/a.tar"),
        ("https://host:8080/a@b.tar#SECRET", "https://host:8080/a@b.tar"),
        ("s3://KEY:SECRET/+x@bucket/train-?.tar", "s3://bucket/train-?.tar"),
        ("s3://bucket/a.tar?X-Amz-Signature=SECRET", "s3://bucket/a.tar"),
        ("https://a/{0..3}.tar?s=SECRET,https://b/c.tar?SECRET", "https://a/{0..3}.tar,https://b/c.tar"),
        ("Redirection to 'https://a/b?s=SECRET': not allowed", "Redirection to 'https://a/b': not allowed"),
        ("hf://datasets/a/b@v1/train-?.tar", "hf://datasets/a/b@v1/train-?.tar"),
        ("data/train-?.tar, why?", "data/train-?.tar, why?"),
    ),
)
def test_texts_without_secrets(secret, shown):
    assert without_secrets(secret) == shown


def test_messages_hold_no_secrets(web, tars, cache, caplog, settings):
    """Whatever fails, a signature in an address is not shown."""
    signed = "?X-Amz-Signature=SECRET"
    patterns = (
        f"{web.url}/train-*.tar{signed}",
        f"{web.url}/{{0000..0003.tar{signed}",
        f"{web.url}/{{a}}.tar{signed}",
        f"{web.url}/a.tar{signed},local.tar",
        f"gs://bucket/a.tar{signed}",
        f"hf://datasets/none{signed}",
        f"s3://me:SECRET@bucket{signed}",
    )
    for pattern in patterns:
        with pytest.raises(UserError) as refusal:
            if remote_shards(pattern, settings()) is None:
                expand(pattern)
        assert "SECRET" not in str(refusal.value) and "://" in str(refusal.value)
    web.fail("/moved.tar", status=302, headers={"Location": f"file://host/a.tar{signed}"})
    web.fail("/refused.tar", status=403)
    web.fail("/lost.tar", status=503, times=None)
    for name in ("moved.tar", "refused.tar", "lost.tar"):
        with pytest.raises(UserError, match=name) as refusal:
            cache.get(from_web(web, tars, f"{name}{signed}"))
        assert "SECRET" not in str(refusal.value)
    assert "trying again" in caplog.text and "SECRET" not in caplog.text


def test_damaged_samples_are_left_out(web, tars, cache):
    damaged = bytearray(tars[NAME])
    damaged[600:700] = bytes(100)  # in the first photo
    web.fail(f"/{NAME}", content=bytes(damaged))
    got = cache.get(from_web(web, tars))
    assert len(got.samples) == COUNTS[0] - 1 and [bad.key for bad in got.bad] == ["0000"]
    assert len(cache.get(from_web(web, tars)).samples) == COUNTS[0] - 1


def test_what_is_no_tar_is_told(web, tars, cache, caplog):
    web.fail(f"/{NAME}", content=b"<html>Please log in</html>" * 100)
    assert len(cache.get(from_web(web, tars)).samples) == 0 and "not a tar file" in caplog.text


def test_threads_fetch_a_shard_once_and_the_oldest_is_evicted(web, tars, settings):
    # Patience: on a busy machine a connection may be silent for longer than a second, and be asked for again.
    cache = Cache(settings(size=f"{sum(map(len, tars.values())) - 1} B", patience=60))
    names = list(tars)
    threads = [threading.Thread(target=cache.get, args=(from_web(web, tars, name),)) for name in names[:3] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(web.requests) == [f"GET /{name}" for name in names[:3]]
    time.sleep(0.02)
    for name in (names[1], names[0], names[3]):
        cache.get(from_web(web, tars, name))
        time.sleep(0.02)
    assert [cache.path(from_web(web, tars, name)).exists() for name in names] == [True, True, False, True]
    assert len(cache.known(from_web(web, tars, names[2])).samples) == COUNTS[2], "its index stays"
    cache.get(from_web(web, tars, names[2]))
    assert len(web.requests) == 5
    own = cache.folder / "mine.tar"
    own.write_bytes(bytes(10 << 20))
    cache.get(from_web(web, tars, names[0]))
    assert own.exists(), "a tar that the cache has not fetched"
    with pytest.raises(UserError, match="data.cache.size 100 bytes is less than"):
        Cache(settings(size="100 B", folder=str(cache.folder / "other"))).get(from_web(web, tars))


def test_a_file_may_not_grow_that_large(web, tars, cache):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"partial: cannot be written \(File too large\)"):
            cache.get(from_web(web, tars))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.get(from_web(web, tars)).path.read_bytes() == tars[NAME]


@pytest.mark.root
def test_a_full_disk(web, tars, settings, tmp_path):
    """Shards are evicted first; then fetching ends in one line, and what was fetched is whole."""
    (tmp_path / "remote").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path / "remote")]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        cache = Cache(settings())
        for name in tars:
            assert cache.get(from_web(web, tars, name)).path.read_bytes() == tars[name]
        held = [path for path in cache.folder.rglob("*.tar")]
        assert 1 <= len(held) < len(tars)
        for path in held:
            path.unlink()
        (tmp_path / "remote" / "other").write_bytes(bytes(80_000))
        with pytest.raises(UserError, match="the disk is full"):
            cache.get(from_web(web, tars))
        assert not list(cache.folder.rglob("*.partial")) and not list(cache.folder.rglob("*.tar"))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "remote")], check=True)
