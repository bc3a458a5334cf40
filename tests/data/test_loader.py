"""The loader's batches are pure functions of (seed, position), whatever the ranks, the start or the bad photos."""

from __future__ import annotations

import io
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast.data.reading.loaders import Pairs, ValidationLoader
from mixreorg_fast.data.reading.samples import SampleReader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards.pair import Pair, write_shard
from mixreorg_fast.data.shards.shard_set import open_shards
from mixreorg_fast.errors import UserError
from mixreorg_fast.images import IMAGENET_MEAN, IMAGENET_STD

from .conftest import bomb, open_loader, pairs, photo

FULL = {"rand_augment_ops": 1, "random_erasing": 0.5}  # a second operation would only take time to build
PLAIN = {"rand_augment_ops": 0, "random_erasing": 0.0}
STILL = {"crop_scale": [1, 1], "crop_ratio": [0.01, 100], "flip": 0.0, **PLAIN}


def take(config, tokenizer, count: int, **options) -> list[Pairs]:
    """The first `count` batches of a loader."""
    with open_loader(config, tokenizer, **options) as loader:
        return list(itertools.islice(loader, count))


def assert_same(left: list[Pairs], right: list[Pairs]) -> None:
    """Bit for bit, whatever the size of the batches."""
    for name in ("images", "ids", "noun_ids"):
        parts = [[getattr(batch, name) for batch in side] for side in (left, right)]
        if parts[0][0] is not None:
            assert torch.equal(*(torch.cat(side) for side in parts))
    for name in ("lengths", "keys"):
        assert [x for batch in left for x in getattr(batch, name)] == [
            x for batch in right for x in getattr(batch, name)
        ]


def test_batch_contents(config, tokenizer):
    (batch,) = take(config(), tokenizer, 1, micro_batch=6)  # the default augmentation
    assert batch.images.shape == (6, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.isfinite().all() and abs(batch.images.mean()) < 1.5
    assert batch.ids.shape == (6, 16) and batch.ids.dtype == torch.int64 and len(batch.lengths) == 6
    assert batch.position == 0 and batch.noun_ids is None
    assert (batch.ids.argmax(dim=1) + 1).tolist() == batch.lengths


def test_captions_belong_to_their_photos_and_all_get_drawn(config, tokenizer):
    texts = {pair.key: pair.captions for pair in pairs(30)}
    drawn = set()
    for batch in take(config({"augment": PLAIN}), tokenizer, 20, micro_batch=6):
        for key, ids in zip(batch.keys, batch.ids, strict=True):
            encoded = tokenizer.encode(texts[key], 16)[0]
            which = [torch.equal(ids, row) for row in encoded]
            assert any(which)
            drawn.add(which.index(True))
    assert drawn == {0, 1}


@pytest.mark.parametrize("augment", [FULL, {**PLAIN, "color_jitter": 0.4}], ids=["rand_augment", "jitter"])
def test_two_ranks_see_what_one_sees(config, tokenizer, augment):
    configuration = config({"augment": augment}, loss={"multi_label": 1.0})
    one = take(configuration, tokenizer, 9, micro_batch=8)  # 72 positions: over two epochs of 30
    ranks = [take(configuration, tokenizer, 9, micro_batch=4, rank=rank, world_size=2) for rank in range(2)]
    assert [batch.position for batch in ranks[1][:2]] == [4, 12]
    assert_same(one, [batch for pair in zip(*ranks, strict=True) for batch in pair])


@pytest.mark.slow
def test_resuming_anywhere_continues_exactly(config, tokenizer):
    configuration = config({"augment": FULL})
    whole = take(configuration, tokenizer, 12, micro_batch=5)
    for start in (5, 40):
        resumed = take(configuration, tokenizer, 3, micro_batch=5, start=start)
        assert_same(whole[start // 5 : start // 5 + 3], resumed)
    odd = take(configuration, tokenizer, 1, micro_batch=3, start=7)[0]  # another batch size, from within a batch
    assert torch.equal(odd.images, torch.cat([batch.images for batch in whole])[7:10])


def test_each_sample_once_per_epoch_and_epochs_differ(config, tokenizer):
    keys = [key for batch in take(config({"augment": PLAIN}), tokenizer, 12, micro_batch=5) for key in batch.keys]
    assert sorted(keys[:30]) == sorted(keys[30:60]) == [pair.key for pair in pairs(30)]
    assert keys[:30] != keys[30:60] and keys[:30] != sorted(keys[:30])


def test_seeds_differ(config, tokenizer):
    one, other = (take(config({"augment": PLAIN}, seed=seed), tokenizer, 1, micro_batch=8)[0] for seed in (0, 1))
    assert one.keys != other.keys


def test_pixels_without_augmentation(config, tokenizer):
    """The whole photo, resized and normalised: close to Pillow's result."""
    images = {pair.key: pair.image for pair in pairs(30)}
    (batch,) = take(config({"augment": STILL}), tokenizer, 1, micro_batch=8)
    for key, image in zip(batch.keys, batch.images, strict=True):
        picture = Image.open(io.BytesIO(images[key])).resize((32, 32), Image.Resampling.BICUBIC)
        expected = (np.asarray(picture) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 0.05


def test_flip_mirrors(config, tokenizer):
    (straight,) = take(config({"augment": STILL}), tokenizer, 1, micro_batch=4)
    (mirrored,) = take(config({"augment": {**STILL, "flip": 1.0}}), tokenizer, 1, micro_batch=4)
    assert torch.equal(straight.images.flip(-1), mirrored.images)


def test_erasing_leaves_rectangles_of_the_mean_colour(config, tokenizer):
    (whole,) = take(config({"augment": STILL}), tokenizer, 1, micro_batch=8)
    (erased,) = take(config({"augment": {**STILL, "random_erasing": 1.0}}), tokenizer, 1, micro_batch=8)
    gone = (erased.images == 0).all(dim=1)
    assert (gone.flatten(1).float().mean(dim=1) > 0.01).all()
    kept = ~gone[:, None].expand_as(whole.images)
    assert torch.equal(whole.images[kept], erased.images[kept])


def test_rand_augment_changes_pixels(config, tokenizer):
    (plain,) = take(config({"augment": STILL}), tokenizer, 1, micro_batch=16)
    options = {**STILL, "rand_augment_ops": 1, "rand_augment_probability": 1.0}
    (changed,) = take(config({"augment": options}), tokenizer, 1, micro_batch=16)
    differs = (plain.images != changed.images).flatten(1).any(dim=1)
    assert differs.sum() >= 12


def test_noun_prompts(config, tokenizer):
    configuration = config({"augment": PLAIN, "nouns": 3}, loss={"multi_label": 1.0})
    nouns = {pair.key: (pair.fields or {}).get("nouns") for pair in pairs(30)}
    seen = set()
    for batch in take(configuration, tokenizer, 5, micro_batch=6):
        assert batch.noun_ids.shape == (6, 3, 16) and len(batch.noun_lengths) == 18
        for key, ids, rows in zip(batch.keys, batch.ids, batch.noun_ids, strict=True):
            if nouns[key] is None:
                assert all(torch.equal(row, ids) for row in rows)  # replaced by its caption
                continue
            prompts = tokenizer.encode([f"a photo of a {noun}." for noun in nouns[key]], 16)[0]
            which = [[torch.equal(row, prompt) for prompt in prompts].index(True) for row in rows]
            assert set(which) == {0, 1}  # both nouns before one repeats
            seen.add(tuple(which[:2]))
    assert seen == {(0, 1), (1, 0)}


def bad_shard(path: Path) -> set[str]:
    """Twenty samples with bad photos of several kinds among them; returns the keys of those."""
    samples = pairs(20)
    cut = photo(3, width=64, height=64)
    bad = {"0003": cut[: len(cut) - 400], "0007": b"<html>404</html>", "0008": b"", "0012": bomb(), "0015": cut[:-300]}
    write_shard(path, [Pair(s.key, bad.get(s.key, s.image), "jpg", s.captions) for s in samples])
    return set(bad)


@pytest.mark.slow
def test_bad_photos_are_replaced_and_the_run_goes_on(config, tokenizer, tmp_path, caplog):
    bad = bad_shard(tmp_path / "bad.tar")
    configuration = config({"shards": str(tmp_path / "bad.tar"), "augment": FULL})
    with open_loader(configuration, tokenizer, micro_batch=5) as loader:
        batches = list(itertools.islice(loader, 16))  # four epochs
        assert {b.key for b in loader.bad_samples} == bad and len(loader.bad_samples) == len(bad)
        assert all(b.reason and b.shard.endswith("bad.tar") for b in loader.bad_samples)
    keys = [key for batch in batches for key in batch.keys]
    assert [len(batch.keys) for batch in batches] == [5] * 16
    assert not bad & set(keys) and len(set(keys)) == 15
    assert len([r for r in caplog.records if "another sample replaces it" in r.message]) == len(bad)
    # A loader that starts later has met none of them yet, and yields the same.
    assert_same(batches[9:12], take(configuration, tokenizer, 3, micro_batch=5, start=45))
    assert_same(batches, take(configuration, tokenizer, 4, micro_batch=20))


def test_only_bad_photos(config, tokenizer, tmp_path):
    write_shard(tmp_path / "bad.tar", [Pair(str(n), b"nothing", "jpg", ["a"]) for n in range(3)])
    configuration = config({"shards": str(tmp_path / "bad.tar"), "augment": PLAIN})
    with (
        open_loader(configuration, tokenizer, micro_batch=2) as loader,
        pytest.raises(UserError, match="shards verify"),
    ):
        next(loader)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_formats(config, tokenizer, tmp_path, format):
    samples = [Pair(str(n), photo(n, format=format), format.lower(), [f"thing {n}"]) for n in range(4)]
    write_shard(tmp_path / "a.tar", samples)
    configuration = config({"shards": str(tmp_path / "a.tar"), "augment": PLAIN})
    with open_loader(configuration, tokenizer, micro_batch=4) as loader:
        assert next(loader).images.shape == (4, 3, 32, 32) and not loader.bad_samples


def test_errors_of_the_thread_reach_the_consumer(config, tokenizer, shards):
    loader = open_loader(config({"augment": PLAIN}), tokenizer, micro_batch=4)
    try:
        for shard in Path(shards).parent.glob("*.tar"):
            with open(shard, "r+b") as file:
                file.truncate(100)
        with pytest.raises(UserError, match="not one sample"):
            for _ in range(20):
                next(loader)
        with pytest.raises(UserError):
            next(loader)
    finally:
        loader.close()


def test_shards_that_vanish_or_are_cut_while_training(config, tokenizer, shards, caplog):
    first, second, third = sorted(Path(shards).parent.glob("*.tar"))
    indexed = open_shards(shards)
    second.rename(second.with_suffix(".away"))
    with open(third, "r+b") as file:
        file.truncate(600)
    photos = SampleReader(indexed, threads=2, device=torch.device("cpu"))
    numbers, samples, *_ = photos.read(np.arange(30))
    photos.close()
    assert len(samples) == 30 and set(numbers) <= set(range(13))  # replaced by samples of the first shard
    assert len(set(numbers[13:])) > 4  # not always the same
    assert len(photos.bad) == 17
    assert all("cannot be opened" in bad.reason or "shorter" in bad.reason for bad in photos.bad.values())
    assert len(caplog.records) == 2  # a line a shard


def test_close_is_clean(config, tokenizer):
    loader = open_loader(config({"augment": PLAIN}), tokenizer, micro_batch=4)
    next(loader)
    loader.close()
    loader.close()
    assert not any(thread.name.startswith("mixreorg-loader") for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_missing_shards(config, tokenizer):
    with pytest.raises(UserError, match="no shard"):
        open_loader(config({"shards": "absent-{0..3}.tar"}), tokenizer, micro_batch=4)


class TestValidation:
    def test_every_pair_once_in_order(self, config, tokenizer, shards):
        batches = list(ValidationLoader(config(), tokenizer, open_shards(shards), micro_batch=8))
        assert [len(batch.keys) for batch in batches] == [8, 8, 8, 6]
        assert [batch.position for batch in batches] == [0, 8, 16, 24]
        assert [key for batch in batches for key in batch.keys] == [pair.key for pair in pairs(30)]
        expected = tokenizer.encode([pair.captions[0] for pair in pairs(30)], 16)[0]
        assert torch.equal(torch.cat([batch.ids for batch in batches]), expected)
        assert batches[0].images.shape == (8, 3, 32, 32)

    def test_ranks_share_the_pairs(self, config, tokenizer, shards):
        opened = open_shards(shards)
        whole = torch.cat([b.images for b in ValidationLoader(config(), tokenizer, opened, micro_batch=8)])
        for rank in range(2):
            loader = ValidationLoader(config(), tokenizer, opened, micro_batch=8, rank=rank, world_size=2)
            for _ in range(2):  # again, from the start
                assert torch.equal(torch.cat([batch.images for batch in loader]), whole[rank::2])

    def test_bad_photos_are_left_out(self, config, tokenizer, tmp_path):
        bad = bad_shard(tmp_path / "bad.tar")
        loader = ValidationLoader(config(), tokenizer, open_shards(str(tmp_path / "bad.tar")), micro_batch=8)
        keys = [key for batch in loader for key in batch.keys]
        assert keys == [pair.key for pair in pairs(20) if pair.key not in bad]


def test_a_tokenizer_of_the_captions(config):
    training_set = TrainingSet.open(config())
    assert len(training_set) == 30
    assert 258 < training_set.train_tokenizer(300).vocab_size <= 300
