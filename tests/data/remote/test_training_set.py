"""Training reads remote shards bit for bit as it reads the same shards from a folder."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
import torch

from mixreorg_fast.cli import main
from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.data.reading.loaders import Pairs, TrainLoader, ValidationLoader
from mixreorg_fast.data.reading.training_set import TrainingSet, open_validation_shards
from mixreorg_fast.data.remote.sets import listed
from mixreorg_fast.errors import UserError
from mixreorg_fast.ranks import Ranks
from mixreorg_fast.training.data import BadSamples, check_bad, open_training_set
from mixreorg_fast.training.preparation import check_inputs

from .conftest import COUNTS, PATIENCE

SAMPLES = sum(COUNTS)
HERE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def new_process():
    """As in a new process, patterns are listed again."""
    listed.clear()
    yield
    listed.clear()


@pytest.fixture
def config(tmp_path):
    def make(shards, cache: dict | None = None, **data) -> Config:
        cache = {"folder": str(tmp_path / "remote"), "patience": PATIENCE, **(cache or {})}
        model = {"image_size": 32, "text": {"context": 16}}
        quick = {"rand_augment_ops": 0}  # building its graph takes longer than the batches here
        data = {"shards": shards, "threads": 1, "cache": cache, "augment": quick, **data}
        return parse_config({"model": model, "data": data})

    return make


@pytest.fixture
def local(tars, tmp_path) -> str:
    folder = tmp_path / "local"
    folder.mkdir()
    for name, content in tars.items():
        (folder / name).write_bytes(content)
    return f"{folder}/train-*.tar"


def batches(config: Config, tokenizer, count: int, **options) -> list[Pairs]:
    training_set = open_training_set(config, HERE, options.pop("state", {}))
    with TrainLoader(config, training_set, tokenizer, micro_batch=4, **options) as loader:
        return list(islice(loader, count))


def same(first: list[Pairs], second: list[Pairs]) -> bool:
    return len(first) == len(second) and all(
        a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids)
        for a, b in zip(first, second, strict=True)
    )


def test_remote_and_local_batches_are_the_same(web, pattern, local, config, tokenizer, monkeypatch):
    there, here = config(pattern), config(local)
    sizes = {TrainingSet.open(place).train_tokenizer(400).vocab_size for place in (there, here)}
    assert len(sizes) == 1
    whole = batches(here, tokenizer, 21)
    assert same(batches(there, tokenizer, 21), whole)
    assert same(batches(there, tokenizer, 6, start=40), whole[10:16]), "resumed"
    # Two ranks that share the cache, one of which fetches; afterwards without the server.
    web.stop()
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        own = batches(there, tokenizer, 4, rank=rank, world_size=2)
        assert same(own, whole[rank : 8 + rank : 2])


def test_a_mixture_of_remote_and_local_sets(web, pattern, local, config, tokenizer):
    sets = [{"pattern": local, "weight": 3}, {"pattern": pattern, "weight": 1}]
    both_here = [{"pattern": local, "weight": 3}, {"pattern": local, "weight": 1}]
    mixed = config(sets)
    assert same(batches(mixed, tokenizer, 12), batches(config(both_here), tokenizer, 12))
    assert len(TrainingSet.open(mixed)) == 2 * SAMPLES
    with pytest.raises(UserError, match="name local and remote shards as two sets"):
        TrainingSet.open(config(f"{local},{pattern}"))


def test_a_fresh_disk_needs_what_is_read_only(web, tars, config, tokenizer, tmp_path):
    """A run that resumes knows from its checkpoint how many samples the shards hold that it has read."""
    content = list(tars.values())
    web.content = lambda path: content[int(path[6:10]) % len(content)]
    pattern = f"{web.url}/train-{{0000..0019}}.tar"
    running = config(pattern, {"window": 2})
    training_set = open_training_set(running, HERE)
    whole = batches(running, tokenizer, 40)
    order = training_set.order
    order.at(150, 4)
    state = {"order": training_set.digest, "remote": training_set.counts}
    web.requests.clear()
    moved = config(pattern, {"window": 2, "folder": str(tmp_path / "fresh"), "size": "200 kB", "workers": 1})
    assert same(batches(moved, tokenizer, 2, start=152, state=state), whole[38:])
    assert len(web.requests) <= 8


def test_a_run_whose_server_is_gone_stops_and_resumes(web, tars, config, tokenizer):
    """What a small cache holds is read; then the run ends in one line, and continues when the server is back."""
    content = list(tars.values())
    web.content = lambda path: content[int(path[6:10]) % len(content)]
    small = config(f"{web.url}/train-{{0000..0019}}.tar", {"window": 2, "size": "200 kB"})
    training_set = open_training_set(small, HERE)
    read: list[Pairs] = []
    with TrainLoader(small, training_set, tokenizer, micro_batch=4) as loader:
        read.append(next(loader))
        web.stop()
        with pytest.raises(UserError, match="refused.*data.cache.patience") as refusal:
            while len(read) < 50:
                read.append(next(loader))
        assert "\n" not in str(refusal.value) and 1 < len(read) < 50
        files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        deleted = [name for name in files if name.endswith(".tar (deleted)")]
        assert len(deleted) <= 2, "removed shards take no space on the disk"
    web.start()
    assert len(batches(small, tokenizer, 2, start=4 * len(read))) == 2


def test_damaged_remote_samples_count(web, tars, pattern, config, tokenizer, tmp_path):
    damaged = bytearray(tars["train-0002.tar"])
    damaged[600:700] = bytes(100)
    web.fail("/train-0002.tar", content=bytes(damaged), times=None)
    loose = config(pattern, max_bad=0.5)
    training_set = open_training_set(loose, HERE)
    assert (training_set.lost, training_set.indexed) == (1, SAMPLES - 1)
    account = BadSamples(loose.model_copy(update={"output": str(tmp_path)}), HERE, training_set, 0)
    assert account.count([]) == 1
    for place in (tmp_path / "remote", tmp_path / "elsewhere"):  # where it was counted, and by a checkpoint's counts
        strict = config(pattern, {"folder": str(place)})
        known = TrainingSet.open(strict)
        known.begin(training_set.counts)
        with pytest.raises(UserError, match=f"1 of {SAMPLES} samples of data.shards cannot be used"):
            check_bad(known, strict)
    unverified = TrainingSet.open(config(pattern, verify=False))
    unverified.begin()
    assert (unverified.lost, len(unverified)) == (1, SAMPLES - 1), "an index that is verified serves too"
    unverified = TrainingSet.open(config(pattern, {"folder": str(tmp_path / "unverified")}, verify=False))
    unverified.begin()
    assert (unverified.lost, len(unverified)) == (0, SAMPLES), "found as it is read"


def test_a_cache_that_is_too_small_is_refused(web, pattern, config):
    with pytest.raises(UserError, match=r"less than two windows of 16 shards .*nearest: data.cache.window 1 or 1 MB"):
        open_training_set(config(pattern, {"size": "120 kB"}), HERE)
    with pytest.raises(UserError, match="expected bytes such as '100 GB'"):
        config(pattern, {"size": "much"})


def test_inputs_are_checked_before_anything_is_fetched(web, hub, config):
    for shards, said in (
        ("hf://datasets/owner/none/*.tar", "no dataset owner/none"),
        (f"{web.url}/*.tar", "lists no files"),
        ("gs://bucket/a.tar", "neither a local path nor hf://"),
    ):
        with pytest.raises(UserError, match=said):
            check_inputs(config(shards), False)
    assert not web.requests


def test_validation_shards(web, pattern, config, tokenizer):
    there = config(None, val_shards=pattern)
    loader = ValidationLoader(there, tokenizer, open_validation_shards(there.data), micro_batch=8)
    assert sum(len(pairs.keys) for pairs in loader) == SAMPLES


def test_commands(web, hub, tars, pattern, tmp_path, capsys):
    hub.add("owner/set", dict(tars), kind="dataset")
    cache = ["--cache-folder", str(tmp_path / "cache")]
    assert main(["shards", "verify", pattern, *cache, "--cache-size", "100 kB"]) == 0
    assert f"{SAMPLES} samples are sound" in capsys.readouterr().out
    assert main(["data", "get", "hf://datasets/owner/set/train-*.tar", *cache]) == 0
    assert f"{SAMPLES} samples are sound" in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "hf").rglob("*.tar"))) == 4
    # A web server does not list sizes: what does not fit is seen late, and never evicts what was fetched.
    sized = f"{sum(map(len, tars.values())) - 1} B"
    assert main(["data", "get", pattern, "--cache-folder", str(tmp_path / "web"), "--cache-size", sized]) == 2
    error = capsys.readouterr().err.split("\r")[-1]
    assert "error: 4 shards have more than the cache holds" in error and error.count("error") == 1
    assert len(list((tmp_path / "web").rglob("*.tar"))) == 3
    assert main(["data", "get", pattern, "--cache-folder", str(tmp_path / "web")]) == 0
    assert f"{SAMPLES} samples are sound" in capsys.readouterr().out
    assert main(["data", "list"]) == 0 and "cc12m" in capsys.readouterr().out
    for arguments, said in (
        (["cc4m"], "no set cc4m (did you mean 'cc3m'?)"),
        (["hf://datasets/owner/set/train-*.tar", "--cache-size", "100 kB"], "more than the cache holds"),
        (["hf://datasets/owner/set/train-*.tar", "--cache-size", "all"], "--cache-size: expected bytes"),
        ([str(Path("a/b.tar"))], "local shards"),
    ):
        assert main(["data", "get", *arguments, "--cache-folder", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
