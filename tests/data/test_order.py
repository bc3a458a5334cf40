"""The order of samples and the random numbers are pure functions of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest

from mixreorg_fast.config import AugmentConfig
from mixreorg_fast.data.reading.augment import crop_boxes, draw
from mixreorg_fast.data.reading.order import Mixture, Order, Purpose, replacement, uniforms


@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_sample_once_per_epoch(window):
    order = Order(np.array([5, 1, 11, 3, 7]), seed=3, window=window)
    epochs = [order.at(epoch * 27, 27) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(27))
    assert not np.array_equal(epochs[0], epochs[1])


def test_any_piece_agrees_with_the_whole():
    order = Order(np.array([50, 10, 110, 30]), seed=1, window=2)
    whole = order.at(0, 1000)
    for position, count in ((0, 1), (199, 2), (190, 420), (999, 1)):  # within, across one and across several epochs
        assert np.array_equal(
            Order(np.array([50, 10, 110, 30]), seed=1, window=2).at(position, count), whole[position : position + count]
        )
        assert np.array_equal(order.at(position, count), whole[position : position + count])


def test_seeds_differ_and_reads_stay_local():
    sizes = np.full(64, 100)
    one, other = Order(sizes, 0, window=4), Order(sizes, 1, window=4)
    assert not np.array_equal(one.at(0, 100), other.at(0, 100))
    assert len(set((one.at(0, 400) // 100).tolist())) == 4  # a window reads from its shards alone


def test_numbers_belong_to_their_position():
    whole = uniforms(7, Purpose.CROP, 0, 50, 10)
    assert np.array_equal(uniforms(7, Purpose.CROP, 13, 20, 10), whole[13:33])
    assert not np.array_equal(uniforms(7, Purpose.FLIP, 0, 50, 10), whole)
    assert (whole >= 0).all() and (whole < 1).all() and abs(whole.mean() - 0.5) < 0.05
    assert uniforms(-1, Purpose.CROP, 2**40, 1, 1).shape == (1, 1)


def test_crops_lie_inside_and_keep_scale_and_ratio():
    config = AugmentConfig(crop_scale=(0.2, 0.6))
    sizes = np.tile([[300, 400]], (4000, 1))
    start, extent = crop_boxes(uniforms(0, Purpose.CROP, 0, len(sizes), 22), sizes, config)
    assert (start >= 0).all() and (start + extent <= 1 + 1e-6).all()
    area, ratio = extent.prod(axis=1), extent[:, 1] * 400 / (extent[:, 0] * 300)
    assert area.min() > 0.19 and area.max() < 0.61 and abs(area.mean() - 0.4) < 0.02
    assert ratio.min() > 0.74 and ratio.max() < 1.35


def test_crops_of_extreme_photos_fall_back_to_the_middle():
    start, extent = crop_boxes(uniforms(0, Purpose.CROP, 0, 2, 22), np.array([[1, 3000], [1, 1]]), AugmentConfig())
    assert extent[0, 0] == 1 and 0 < extent[0, 1] <= 2 / 3000 and abs(start[0, 1] - 0.5) < 0.01
    assert (extent[1] == 1).all() and (start[1] == 0).all()


def test_probabilities_are_met():
    config = AugmentConfig(flip=0.3, rand_augment_ops=2, rand_augment_probability=0.5, random_erasing=0.25)
    drawn = draw(config, 0, 0, np.full((8000, 2), 64))
    assert abs(drawn["flip"].mean() - 0.3) < 0.02
    assert abs((drawn["operation"] > 0).mean() - 0.5) < 0.02
    assert set(np.unique(drawn["operation"])) == set(range(16))
    assert abs(drawn["magnitude"].mean() - 27) < 0.1 and drawn["magnitude"].max() <= 30
    erased = drawn["erase_extent"].prod(axis=1)
    assert abs((erased > 0).mean() - 0.25) < 0.02 and erased.max() < 0.34


def test_what_is_off_is_not_drawn():
    drawn = draw(AugmentConfig(rand_augment_ops=0, random_erasing=0.0), 0, 0, np.full((4, 2), 64))
    assert set(drawn) == {"start", "extent", "flip"}
    jitter = draw(AugmentConfig(rand_augment_ops=0, color_jitter=0.4), 0, 0, np.full((4, 2), 64))
    assert {"brightness", "contrast", "saturation", "hue"} < set(jitter)


class TestMixture:
    SIZES = (np.array([30, 20]), np.array([7, 4, 6]), np.array([500]))
    WEIGHTS = (3.0, 1.0, 4.0)

    def mixture(self, seed: int = 1) -> Mixture:
        orders = [Order(part, seed, window=2, stream=number) for number, part in enumerate(self.SIZES)]
        return Mixture(orders, self.WEIGHTS, seed)

    def test_shares_are_the_weights(self):
        mixture = self.mixture()
        assert mixture.samples == 567
        for first in (0, 5 * Mixture.BLOCK):  # of every block exactly
            sets = np.searchsorted([50, 67], mixture.at(first, Mixture.BLOCK), side="right")
            assert np.bincount(sets).tolist() == [Mixture.BLOCK * w // 8 for w in (3, 1, 4)]
        # Within a block they are drawn: any stretch of it is close.
        sets = np.searchsorted([50, 67], mixture.at(1000, 8000), side="right")
        assert np.abs(np.bincount(sets) / 8000 - np.array([3, 1, 4]) / 8).max() < 0.02

    def test_each_set_has_epochs_of_its_own(self):
        drawn = self.mixture().at(0, 2000)
        small = drawn[(drawn >= 50) & (drawn < 67)] - 50
        for epoch in range(len(small) // 17):
            assert sorted(small[epoch * 17 : (epoch + 1) * 17].tolist()) == list(range(17))
        assert not np.array_equal(small[:17], small[17:34])
        assert np.array_equal(small, Order(self.SIZES[1], 1, window=2, stream=1).at(0, len(small)))

    def test_any_piece_agrees_with_the_whole(self):
        """So neither the number of ranks nor where a run resumes changes the order, across blocks too."""
        start = 3 * Mixture.BLOCK - 1000
        whole = self.mixture().at(start, 2000)
        for position, count in ((0, 1), (999, 2), (700, 700), (1999, 1)):
            assert np.array_equal(self.mixture().at(start + position, count), whole[position : position + count])
        four_ranks = [self.mixture().at(start + rank * 50 + step * 200, 50) for step in range(10) for rank in range(4)]
        assert np.array_equal(np.concatenate(four_ranks), whole)
        # Counted through from the start: what a block says of the positions before it is true.
        through = self.mixture().at(0, start + 2000)
        assert np.array_equal(through[start:], whole)

    def test_seeds_differ(self):
        assert not np.array_equal(self.mixture(0).at(0, 100), self.mixture(1).at(0, 100))

    def test_a_weight_too_small(self):
        with pytest.raises(ValueError, match="1/65536"):
            Mixture([Order(part, 0) for part in self.SIZES[:2]], (1.0, 1e-6), 0)


def test_replacements_are_spread_and_reach_every_sample():
    firsts = {replacement(sample, 0, 100, 1000) for sample in range(100, 600)}
    assert len(firsts) > 350 and min(firsts) >= 100 and max(firsts) < 1100
    assert {replacement(107, attempt, 100, 20) for attempt in range(64 + 20)} == set(range(100, 120))
