"""Patterns of the hub and of S3 become lists of shards, which are fetched with the clients' own credentials."""

from __future__ import annotations

import logging

import pytest

from mixreorg_fast.data.remote.cache import Cache
from mixreorg_fast.data.remote.sources import RemoteShard, is_remote, list_shards, request
from mixreorg_fast.errors import UserError
from tests.servers.repositories import TOKEN

from .conftest import COUNTS


def names(shards: list[RemoteShard]) -> list[str]:
    return [shard.url.rpartition("/")[2] for shard in shards]


@pytest.fixture
def repository(hub, tars):
    return hub.add(
        "owner/set", {**tars, "sub/train-0009.tar": tars["train-0000.tar"], "README.md": b"#"}, kind="dataset"
    )


def test_the_hub_lists_and_sends(hub, repository, tars, cache, caplog):
    hub.page = 2
    pattern = "hf://datasets/owner/set/train-*.tar"
    shards = list_shards(pattern, cache.folder / "listings")
    assert is_remote(pattern) and names(shards) == list(tars)
    assert [shard.size for shard in shards] == [len(content) for content in tars.values()]
    for name, chosen in (
        ("{train-0002,train-0000}.tar", [2, 0]),
        ("train-{0001..0003}.tar", [1, 2, 3]),
        ("train-000[03].tar", [0, 3]),
    ):
        assert names(list_shards(f"hf://datasets/owner/set/{name}", cache.folder / "listings")) == [
            list(tars)[i] for i in chosen
        ]
    assert names(list_shards("hf://datasets/owner/set/*/*.tar", cache.folder / "listings")) == ["train-0009.tar"]
    for shard, count in zip(shards, COUNTS, strict=True):
        assert len(cache.get(shard).samples) == count
    repository.tag("v1")
    repository.commit({**repository.files, "train-0001.tar": tars["train-0000.tar"]})
    now = list_shards(pattern, cache.folder / "listings")
    assert [cache.ready(shard) for shard in now] == [True, False, True, True], "only what changed is fetched again"
    for old in (f"{pattern}@v1", "hf://datasets/owner/set@v1/train-*.tar"):
        assert list_shards(old, cache.folder / "listings") == shards
    hub.fail("/api/*", status=500, times=None)
    with caplog.at_level(logging.WARNING):
        assert (
            list_shards(pattern, cache.folder / "listings") == now and "the list stored at its last use" in caplog.text
        )
    with pytest.raises(UserError, match="cannot be listed: .*500"):
        list_shards("hf://datasets/owner/set/train-0*.tar", cache.folder / "listings")


def test_faults_of_the_hub(hub, repository, tars, cache):
    shards = list_shards("hf://datasets/owner/set/train-*.tar", cache.folder / "listings")
    for fault in ({"cut": 3000}, {"status": 503}, {"content": b"x" * len(tars["train-0000.tar"])}):
        hub.fail("*/train-0000.tar", **fault)
    assert cache.get(shards[0]).path.read_bytes() == tars["train-0000.tar"]


def test_refusals_of_the_hub(hub, repository, tars, cache, monkeypatch):
    hub.add("owner/gated", tars, kind="dataset", gated=True)
    for pattern, said in (
        ("hf://datasets/owner/none/*.tar", "no dataset owner/none"),
        ("hf://datasets/owner/set/*.tar@v9", "no revision v9"),
        ("hf://datasets/owner/set/no/*.tar", "no folder no"),
        ("hf://datasets/owner/set/train-{0003..0005}.tar", r"no shard train-0004.tar and 1 more.*did you mean"),
        ("hf://datasets/owner/set/x-*.tar", "no shard x-"),
    ):
        with pytest.raises(UserError, match=said):
            list_shards(pattern, cache.folder / "listings")
    (gated, *_) = list_shards("hf://datasets/owner/gated/*.tar", cache.folder / "listings")
    with pytest.raises(UserError, match="401 Access to owner/gated is restricted; `hf auth login`"):
        cache.get(gated)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(cache.get(gated).samples) == COUNTS[0]


def test_globs_take_tars_and_the_suffix_that_they_name(hub, cache):
    hub.add("owner/odd", dict.fromkeys(("train-0.wds", "train-1.tar", "train-2.txt"), b"x"), kind="dataset")
    for glob, found in (("train-*", ["train-1.tar"]), ("train-*.wds", ["train-0.wds"])):
        assert names(list_shards(f"hf://datasets/owner/odd/{glob}", cache.folder / "listings")) == found


def test_s3_lists_and_sends(bucket, tars, cache, settings):
    for name, content in tars.items():
        bucket.put(f"set/{name}", content)
    shards = list_shards("s3://bucket/set/train-*.tar", cache.folder / "listings")
    assert names(shards) == list(tars) and all((shard.checksum or "").startswith("md5:") for shard in shards)
    assert len(cache.get(shards[2]).samples) == COUNTS[2]
    for pattern, said in (
        ("s3://bucket/set/x-*.tar", "no shard bucket/set/x-"),
        ("s3://none/set/*.tar", "there is no none/set"),
    ):
        with pytest.raises(UserError, match=said):
            list_shards(pattern, cache.folder / "listings")
    bucket.delete("set/train-0000.tar")
    with pytest.raises(UserError, match=r"s3://bucket/set/train-0000.tar: 404") as refusal:
        cache.get(shards[0])
    assert "secret" not in str(refusal.value) and "Signature" not in str(refusal.value)
    assert len(Cache(settings()).get(shards[2]).samples) == COUNTS[2]


def test_the_hub_is_left_alone_when_told_so(hub, repository, tars, cache, monkeypatch, caplog):
    pattern = "hf://datasets/owner/set/train-*.tar"
    shards = list_shards(pattern, cache.folder / "listings")
    cache.get(shards[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    with caplog.at_level(logging.WARNING):
        assert (
            list_shards(pattern, cache.folder / "listings") == shards
            and "the list stored at its last use" in caplog.text
        )
    assert len(cache.get(shards[0]).samples) == COUNTS[0]
    with pytest.raises(UserError, match="train-0001.tar: it is not in the cache, and HF_HUB_OFFLINE is set"):
        cache.get(shards[1])
    with pytest.raises(UserError, match="cannot be listed: .*HF_HUB_OFFLINE"):
        list_shards("hf://datasets/owner/set/*.tar", cache.folder / "listings")
    assert len(hub.requests) == asked


def test_s3_without_credentials_and_with_wrong_ones(bucket, tars, cache, tmp_path, monkeypatch):
    import requests
    from s3fs import S3FileSystem

    bucket.put("train-0000.tar", tars["train-0000.tar"], ACL="public-read")
    bucket.put("train-0001.tar", tars["train-0001.tar"])
    with monkeypatch.context() as nobody:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            nobody.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            nobody.setenv(name, str(tmp_path / "none"))
        nobody.setenv("AWS_EC2_METADATA_DISABLED", "true")
        S3FileSystem.clear_instance_cache()
        shards = list_shards("s3://bucket/train-*.tar", cache.folder / "listings")
        assert "Signature" not in request(shards[0]).full_url
        assert len(cache.get(shards[0]).samples) == COUNTS[0]
        with pytest.raises(UserError, match="s3://bucket/train-0001.tar: 403 .*check AWS's credentials"):
            cache.get(shards[1])  # which is not public
    S3FileSystem.clear_instance_cache()
    requests.post(f"{bucket.url}/moto-api/reset-auth", data=b"0", timeout=10)  # keys are checked from here on
    try:
        with pytest.raises(UserError, match="s3://bucket/.*check AWS's credentials") as refusal:
            list_shards("s3://bucket/*.tar", cache.folder / "listings")
        assert not any(word in str(refusal.value) for word in ("secret-of", "Signature", "\n"))
    finally:
        requests.post(f"{bucket.url}/moto-api/reset-auth", data=b"inf", timeout=10)


def test_a_url_that_is_signed_again_keeps_its_place():
    """Else the shards of a set whose signatures have run out would be fetched again."""

    def place(query: str):
        return RemoteShard(f"https://host/train-0.tar?{query}").place

    signed = place("part=1&X-Amz-Date=20261127T000000Z&X-Amz-Expires=600&X-Amz-Signature=aa11")
    assert (
        signed == place("part=1&X-Amz-Date=20261128T000000Z&X-Amz-Expires=600&X-Amz-Signature=bb22") == place("part=1")
    )
    assert place("sv=2024&se=2026-11-27&sig=aa") == place("sv=2024&se=2026-11-28&sig=bb")
    assert place("part=2") != place("part=1") and place("state=1") != place("state=2")
