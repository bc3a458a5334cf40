"""What training reads when data are bad: it never stops for them, and each is left out, counted and listed.

Cases are read twice, from shards that were verified before and from shards that were not, and come to the same.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixreorg_fast.data.reading.loaders import TrainLoader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards import index
from mixreorg_fast.data.shards.index import index_places
from mixreorg_fast.data.shards.pair import Pair, write_shard
from mixreorg_fast.data.shards.scan import Bad
from mixreorg_fast.data.shards.verify import verify
from mixreorg_fast.errors import UserError
from mixreorg_fast.ranks import Ranks
from mixreorg_fast.training.data import BadSamples, check_bad, open_training_set
from mixreorg_fast.training.preparation import prepare

from .conftest import bomb, open_loader, pairs, photo

HERE = Ranks(0, 1, torch.device("cpu"))


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def picture(width: int = 40, height: int = 32) -> Image.Image:
    return Image.open(io.BytesIO(photo(1))).resize((width, height))


TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # orientation 6
WHOLE = photo(3, width=64, height=64)
# Photos and captions that are out of the ordinary, and whether training uses them.
PHOTOS = {
    "cut": (WHOLE[:-300], False),
    "cut_progressive": (encoded(picture(64, 64), progressive=True)[:-200], False),
    "cut_in_header": (WHOLE[:20], False),
    "empty": (b"", False),
    "html": (b"<html>404</html>", False),
    "gif": (encoded(picture(), "GIF"), False),
    "bomb": (bomb(), False),
    "pixels_20000": (encoded(Image.new("L", (20_000, 20_000)), "PNG"), False),
    "wide_20000": (encoded(picture(20_000, 10)), True),
    "cmyk": (encoded(picture().convert("CMYK")), True),
    "grey": (encoded(picture().convert("L")), True),
    "one_pixel": (encoded(picture(1, 1)), True),
    "palette": (encoded(picture().convert("P"), "PNG"), True),
    "transparent": (encoded(picture().convert("RGBA"), "PNG"), True),
    "16_bit": (encoded(Image.new("I;16", (9, 9), 4000), "PNG"), True),
    "progressive": (encoded(picture(), progressive=True), True),
    "turned": (encoded(picture(), exif=TURNED), True),
}
CAPTIONS = {
    "no_text": (b"", False),
    "only_space": (b" \n\t\n", False),
    "10_kB": (b"word " * 2000, False),
    "latin_1": ("schön".encode("latin-1"), False),
    "latin_1_and_another": ("schön\nfine".encode("latin-1"), True),
    "nul": (b"a\0thing", True),
    "emoji": ("🐈 on a mat".encode(), True),
}


def add(tar: tarfile.TarFile, name: str, data: bytes, **attributes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def read(config, tokenizer, *, verified: bool, batches: int = 12) -> tuple[TrainingSet, list[Bad], Counter]:
    """About three epochs: the training set, the samples that the loader found bad, and how often each key was read."""
    training_set = open_training_set(config, HERE) if verified else TrainingSet.open(config)
    keys: Counter = Counter()
    with TrainLoader(config, training_set, tokenizer, micro_batch=8) as loader:
        for batch in itertools.islice(loader, batches):
            assert batch.images.shape == (8, 3, 32, 32) and batch.images.isfinite().all()
            keys.update(batch.keys)
    return training_set, loader.bad_samples, keys


@pytest.fixture
def plain(config):
    """A configuration without augmentation that reads one pattern."""

    def make(pattern, **data):
        return config({"shards": pattern, "augment": {"rand_augment_ops": 0, "random_erasing": 0.0}, **data})

    return make


def listed(training_set: TrainingSet, found: list[Bad]) -> list[str]:
    return sorted(bad.key for bad in (*training_set.bad, *found))


@pytest.mark.parametrize("verified", [False, True], ids=["as_they_are", "verified"])
def test_samples(plain, tokenizer, tmp_path, verified):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, (image, _) in PHOTOS.items():
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.txt", b"a thing")
        for key, (text, _) in CAPTIONS.items():
            add(tar, f"{key}.jpg", WHOLE)
            add(tar, f"{key}.txt", text)
        add(tar, "no_caption.jpg", WHOLE)
        add(tar, "no_image.txt", b"a thing")
        add(tar, "README.md", b"neither one nor the other")
    bad = {key for key, (_, used) in (PHOTOS | CAPTIONS).items() if not used} | {"no_caption", "no_image"}
    good = {key for key, (_, used) in (PHOTOS | CAPTIONS).items() if used}
    training_set, found, keys = read(plain(str(tmp_path / "a.tar")), tokenizer, verified=verified)
    assert set(keys) == good
    assert listed(training_set, found) == sorted(bad)
    assert training_set.lost + len(found) == len(bad)
    assert len(found) == (0 if verified else len(bad) - 2)
    assert all(entry.reason for entry in (*training_set.bad, *found))
    if verified:  # each once per epoch, none in another's place
        assert max(keys.values()) - min(keys.values()) <= 1


@pytest.mark.parametrize("verified", [False, True], ids=["as_they_are", "verified"])
def test_shards(plain, tokenizer, tmp_path, verified):
    """A truncated tar, an empty file, a tar without members, a file that is not a tar, a compressed tar."""
    write_shard(tmp_path / "a.tar", pairs(10))
    write_shard(tmp_path / "cut.tar", pairs(10, 10))
    with tarfile.open(tmp_path / "cut.tar") as tar:
        os.truncate(tmp_path / "cut.tar", tar.getmember("0014.jpg").offset_data + 100)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "members.tar").write_bytes(bytes(10240))
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 1000)
    training_set, found, keys = read(plain(str(tmp_path / "*.tar")), tokenizer, verified=verified)
    assert set(keys) == {f"{n:04d}" for n in range(14)} and len(training_set) == 14
    assert [Path(bad.shard).name for bad in training_set.bad] == ["cut.tar", "empty.tar", "no.tar"]
    # The mean of the two whole ones is 5: the cut one has lost its end, the other two 5 each.
    assert training_set.lost == 1 + 5 + 5


def test_a_shard_that_vanishes_before_and_between_epochs(plain, tokenizer, tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", pairs(8, 8 * number))
    config = plain(str(tmp_path / "*.tar"))
    whole, *_ = read(config, tokenizer, verified=True)
    (tmp_path / "1.tar").unlink()
    training_set, found, keys = read(config, tokenizer, verified=True)
    assert len(training_set) == len(whole) == 24  # positions mean what they meant
    assert set(keys) == {f"{n:04d}" for n in (*range(8), *range(16, 24))}
    assert listed(training_set, found) == [f"{n:04d}" for n in range(8, 16)]


def test_members_with_evil_names_are_written_nowhere(plain, tokenizer, tmp_path, monkeypatch):
    """Names that lead out of the folder, links and devices: a reader that unpacked them would be had."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    names = ["../../evil", f"{tmp_path}/evil1", "C:\\evil", "a/../../evil2", "~/evil", "$(touch evil3)"]
    with tarfile.open("a.tar", "w") as tar:
        for name in names:
            add(tar, f"{name}.jpg", WHOLE)
            add(tar, f"{name}.txt", b"a thing")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            add(tar, "link.jpg", b"", type=kind, linkname="/etc/passwd")
        add(tar, "link.txt", b"a thing")
    before = set(tmp_path.rglob("*"))
    training_set, found, keys = read(plain("a.tar"), tokenizer, verified=True)
    assert set(tmp_path.rglob("*")) - before == {inside / "a.tar.index", inside / "a.tar.broken.tsv"}
    assert not (tmp_path.parent / "evil.jpg").exists() and len(keys) == len(names)
    assert listed(training_set, found) == ["link"]  # it has no image of its own


def test_verifying_and_reading_agree_after_the_fact(plain, tokenizer, tmp_path):
    """Verification finds what reading found, no more and no less."""
    write_shard(tmp_path / "a.tar", [Pair(k, image, "jpg", ["a"]) for k, (image, _) in PHOTOS.items()])
    _, found, _ = read(plain(str(tmp_path / "a.tar")), tokenizer, verified=False)
    (shard,) = verify(str(tmp_path / "a.tar"), progress=False)
    assert sorted(shard.bad) == sorted(found)
    assert {bad.key: bad.reason for bad in shard.bad}["bomb"].startswith("60000 x 60000 pixels")


def refuse_writing(monkeypatch, refuses: Callable[[Path], bool]) -> None:
    """Stage a read-only folder, since root may write anywhere: an index or a list that `refuses` is not written."""
    for name in ("atomic_path", "write_text"):
        write = getattr(index, name)

        def refuse(path, *rest, write=write):
            if refuses(path):
                raise PermissionError
            return write(path, *rest)

        monkeypatch.setattr(index, name, refuse)


class TestReady:
    @pytest.fixture
    def three(self, tmp_path) -> Path:
        for number in range(3):
            broken = [Pair(f"bad{number}", b"no", "jpg", ["x"])] if number else []
            write_shard(tmp_path / f"{number}.tar", pairs(20, 20 * number) + broken)
        return tmp_path

    def test_verified_shards_cost_nothing(self, plain, three, monkeypatch):
        config = plain(str(three / "*.tar"))
        open_training_set(config, HERE)
        assert TrainingSet.open(config).lost == 2
        monkeypatch.setattr("mixreorg_fast.training.data.verifying", lambda *_: pytest.fail("verified again"))
        open_training_set(config, HERE)

    def test_a_shard_that_changes_is_verified_again(self, plain, three):
        config = plain(str(three / "*.tar"))
        open_training_set(config, HERE)
        write_shard(three / "0.tar", [Pair("worse", b"no", "jpg", ["x"]), *pairs(4)])
        open_training_set(config, HERE)
        assert TrainingSet.open(config).lost == 3

    def test_what_changes_the_order_is_noticed(self, plain, three):
        config = plain(str(three / "*.tar"))
        unverified = TrainingSet.open(config).digest
        open_training_set(config, HERE)
        verified = TrainingSet.open(config).digest
        (three / "1.tar").unlink()  # its index is still there, and so is its place
        assert unverified != verified == TrainingSet.open(config).digest
        (three / "1.tar.index").unlink()
        assert TrainingSet.open(config).digest != verified

    def test_unless_it_is_off(self, plain, three):
        config = plain(str(three / "*.tar"), verify=False)
        opened = open_training_set(config, HERE)
        assert opened.lost == 0 and not any(shard.verified for shard in opened.shards.shards)

    def test_read_only_folders(self, plain, three, monkeypatch):
        """The index goes to the cache folder."""
        refuse_writing(monkeypatch, lambda path: path.parent == three)
        config = plain(str(three / "*.tar"))
        opened = open_training_set(config, HERE)
        assert opened.lost == 2 and [bad.key for bad in opened.bad] == ["bad1", "bad2"]
        assert sorted(path.name for path in three.glob("?.*")) == ["0.tar", "1.tar", "2.tar"]
        assert all(index_places(shard.path)[1].is_file() and shard.verified for shard in opened.shards.shards)

    def test_over_the_share_the_run_stops(self, plain, three):
        opened = open_training_set(plain(str(three / "*.tar")), HERE)
        check_bad(opened, plain("x", max_bad=2 / 62))
        with pytest.raises(UserError, match=r"2 of 62 samples .* data\.max_bad 0\.032; SHARD\.broken\.tsv .*: bad1: "):
            check_bad(opened, plain("x", max_bad=0.032))
        strict = plain(str(three / "*.tar")).model_copy(update={"output": str(three / "runs")})
        strict = strict.model_copy(update={"train": strict.train.model_copy(update={"batch": 8})})
        with pytest.raises(UserError, match=r"more than data\.max_bad 0\.01"):
            prepare(strict, opened, resuming=False)
        assert not (three / "runs").exists()

    def test_the_run_stops_where_the_list_can_be_written_nowhere(self, plain, tmp_path, monkeypatch):
        write_shard(tmp_path / "a.tar", pairs(3))
        with tarfile.open(tmp_path / "a.tar", "a") as tar:
            add(tar, "no_caption.jpg", WHOLE)
        refuse_writing(monkeypatch, lambda path: True)
        config = plain(str(tmp_path / "a.tar"), verify=False)
        opened = open_training_set(config, HERE)
        assert not list(tmp_path.glob("a.tar.*")) and opened.bad == [(f"{tmp_path}/a.tar", "", "samples left out: 1")]
        with pytest.raises(UserError, match=r"1 of 4 samples .*max_bad 0\.01.*a\.tar: samples left out: 1"):
            check_bad(opened, config)


def ranks_of_one_node(rank: int) -> dict[str, str]:
    """Environment of a rank of two, as the deepspeed launcher sets it: without LOCAL_WORLD_SIZE."""
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}


@pytest.mark.launch
def test_two_ranks_share_the_work_and_the_account(tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", [*pairs(10, 10 * number), Pair(f"bad{number}", b"no", "jpg", ["x"])])
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.data.ready_worker", str(tmp_path)],
            env={**os.environ, **ranks_of_one_node(rank), "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    one, two = (json.loads((tmp_path / f"told_{rank}.json").read_text()) for rank in range(2))
    assert (one["verified"], two["verified"]) == (["0.tar", "2.tar"], ["1.tar", "3.tar"])
    for told in (one, two):
        assert (told["samples"], told["lost"]) == (40, 4)
        assert not told["waited"]  # for no other node's files: there is one node
        assert told["refusal"].startswith("rank 1 on ") and "(10 and 40 samples)" in told["refusal"]
        assert told["absence"].startswith("rank 1 on ") and told["absence"].endswith(": no shard a.tar")
        assert told["failure"] == "the disk of rank 1"
    # The samples of the shard that vanished, as far as either rank came across them, and those left out before.
    assert one["bad"] == two["bad"] > 4
    rows = (tmp_path / "mixreorg" / "bad_samples.tsv").read_text().splitlines()
    assert len(rows) == len(set(rows)) == one["bad"]


def test_the_account_of_a_run(plain, tokenizer, tmp_path):
    """Listed in the run folder, said at the end of the epoch; over the share, the run stops with the list."""
    images = {3: b"no", 7: WHOLE[:-300]}
    samples = [Pair(p.key, images.get(n, p.image), "jpg", p.captions) for n, p in enumerate(pairs(24))]
    write_shard(tmp_path / "a.tar", samples)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        add(tar, "no_caption.jpg", WHOLE)
    config = plain(str(tmp_path / "a.tar"), max_bad=3 / 25, verify=False)
    config = config.model_copy(update={"output": str(tmp_path)})
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad": 0.1})})
    training_set = TrainingSet.open(config)
    accounts = BadSamples(config, HERE, training_set, 0), BadSamples(strict, HERE, training_set, 0)
    with TrainLoader(config, training_set, tokenizer, micro_batch=8) as loader:
        assert accounts[0].count(loader.bad_samples) <= 3 and accounts[0].remark(8) is None
        for _ in range(4):  # a batch of the second epoch, so that the first is through
            next(loader)
        assert accounts[0].count(loader.bad_samples) == 3
        remark = accounts[0].remark(32)
        assert remark == f"epoch 1 ended: 3 of 25 samples could not be used ({tmp_path}/mixreorg/bad_samples.tsv)"
        assert accounts[0].remark(40) is None
        with pytest.raises(UserError, match=r"3 of 25 samples .* data\.max_bad 0\.1; .*bad_samples\.tsv lists them"):
            accounts[1].count(loader.bad_samples)
    rows = [line.split("\t") for line in (tmp_path / "mixreorg" / "bad_samples.tsv").read_text().splitlines()]
    assert sorted(key for _, key, _ in rows) == ["0003", "0007", "no_caption"]


def test_mixtures(plain, tokenizer, tmp_path):
    """Two ranks, and a loader that starts later, go through the same samples; replacements come from the same set."""
    write_shard(tmp_path / "a.tar", [Pair("bad", b"no", "jpg", ["x"]), *pairs(5)])
    write_shard(tmp_path / "b.tar", pairs(12, 100))
    sets = [{"pattern": str(tmp_path / "a.tar"), "weight": 3.0}, {"pattern": [str(tmp_path / "b.tar")]}]
    config = plain(sets)
    assert len(TrainingSet.open(config)) == 18

    def keys(count: int, **options) -> list[str]:
        with open_loader(config, tokenizer, **options) as loader:
            return [batch.keys for batch in itertools.islice(loader, count)]

    whole = list(itertools.chain(*keys(30, micro_batch=8)))
    ranks = [keys(15, micro_batch=8, rank=rank, world_size=2) for rank in range(2)]
    assert list(itertools.chain(*(keys for step in zip(*ranks, strict=True) for keys in step))) == whole
    assert list(itertools.chain(*keys(5, micro_batch=8, start=104))) == whole[104:144]
    small = sum(int(key) < 100 for key in whole)  # no replacement of the bad one is of the other set
    assert abs(small / len(whole) - 0.75) < 0.06 and "bad" not in whole
    with pytest.raises(UserError, match=r"data\.shards: a weight is less than 1/65536"):
        TrainingSet.open(plain([{**sets[0], "weight": 1e9}, sets[1]]))
