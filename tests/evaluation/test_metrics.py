import math

import numpy as np
import pytest
import torch

from mixreorg_fast.evaluation import metrics
from mixreorg_fast.inference.windows import Decoded

CLASSES = 7


def random_masks(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth with ignored pixels and a prediction that is right half of the time; class 5 is in neither."""
    rng = np.random.default_rng(seed)
    values = np.array([0, 1, 2, 3, 4, 6, 255], dtype=np.uint8)
    truth = rng.choice(values, size=(37, 53))
    guess = rng.choice(values[:-1], size=truth.shape)
    return truth, np.where((rng.random(truth.shape) < 0.5) & (truth != 255), truth, guess)


def test_iou_is_that_of_sets_of_pixels():
    truth, prediction = random_masks()
    matrix = metrics.confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), CLASSES)
    scored = {tuple(p) for p in np.argwhere(truth != 255).tolist()}
    expected = []
    for c in range(CLASSES):
        true, found = ({tuple(p) for p in np.argwhere(m == c).tolist()} & scored for m in (truth, prediction))
        expected.append(100 * len(true & found) / len(true | found) if true | found else math.nan)
    np.testing.assert_allclose(metrics.per_class_iou(matrix).numpy(), expected, atol=1e-6)
    assert math.isnan(expected[5])
    assert metrics.mean_iou(matrix) == pytest.approx(np.nanmean(expected), abs=1e-6)
    assert matrix.sum() == len(scored)


def test_confusion_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    truth, prediction = random_masks(1)
    matrix = metrics.confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), CLASSES)
    known = truth != 255
    expected = sklearn.confusion_matrix(truth[known], prediction[known], labels=range(CLASSES))
    assert (matrix.numpy() == expected).all()
    iou = 100 * sklearn.jaccard_score(truth[known], prediction[known], labels=[0, 1, 2, 3, 4, 6], average=None)
    assert metrics.mean_iou(matrix) == pytest.approx(iou.mean(), abs=1e-6)


def test_a_class_only_predicted_counts_as_zero():
    truth, prediction = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    matrix = metrics.confusion_matrix(truth, prediction, 3)
    assert metrics.per_class_iou(matrix)[:2].tolist() == [75.0, 0.0]
    assert metrics.mean_iou(matrix) == 37.5


def test_all_background_is_the_score_of_zeros():
    truth, prediction = (torch.from_numpy(m) for m in random_masks(2))
    matrix = metrics.confusion_matrix(truth, prediction, CLASSES)
    zeros = metrics.confusion_matrix(truth, torch.zeros_like(prediction), CLASSES)
    assert metrics.mean_iou(metrics.one_class_matrix(matrix)) == metrics.mean_iou(zeros)


def test_oracle_gives_each_segment_its_commonest_class():
    truth, segments = (torch.from_numpy(m) for m in random_masks(3))
    overlap = metrics.overlaps(truth, segments, CLASSES, CLASSES)
    best = torch.zeros_like(truth)
    for s in range(CLASSES):
        inside = truth[(segments == s) & (truth != 255)]
        if len(inside):
            best[segments == s] = inside.bincount().argmax().to(best.dtype)
    expected = metrics.confusion_matrix(truth, best, CLASSES)
    assert torch.equal(metrics.oracle_matrix(overlap), expected)


def test_frequent_classes_are_those_that_many_photos_show():
    tally = metrics.Tally(3)
    both, first = torch.tensor([[0, 1, 255, 0]]), torch.tensor([[0, 0, 255, 0]])
    for index in range(metrics.FREQUENT):
        labels = torch.tensor([[0, 1, 0, 0 if index else 2]])
        tally.add(index, both, Decoded(labels, torch.zeros_like(both), 1, 1, torch.zeros(1, 3)))
    assert tally.photos.tolist() == [metrics.FREQUENT, metrics.FREQUENT, 0]
    assert metrics.mean_iou(tally.matrix) == pytest.approx((100 * 59 / 60 + 100 + 0) / 3)
    assert metrics.frequent_mean_iou(tally.matrix, tally.photos) == pytest.approx((100 * 59 / 60 + 100) / 2)
    tally.add(metrics.FREQUENT, first, Decoded(first, torch.zeros_like(first), 1, 1, torch.zeros(1, 3)))
    assert tally.photos.tolist() == [metrics.FREQUENT + 1, metrics.FREQUENT, 0]
    assert metrics.frequent_mean_iou(tally.matrix, tally.photos - 1) is None  # one frequent class
    assert metrics.frequent_mean_iou(tally.matrix, tally.photos + metrics.RARE) is None  # no rare class


def naive_boundary_counts(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """The definition pixel by pixel: a mask's pixels whose neighbourhood leaves the mask or the photo."""
    distance = max(1, round(0.02 * math.hypot(*truth.shape)))
    prediction = np.where(truth < classes, prediction, 255)

    def region(mask: np.ndarray) -> np.ndarray:
        framed = np.pad(mask, distance)
        inner = [
            framed[y : y + 2 * distance + 1, x : x + 2 * distance + 1].all()
            for y in range(mask.shape[0])
            for x in range(mask.shape[1])
        ]
        return mask & ~np.array(inner).reshape(mask.shape)

    regions = [[region(labels == c) for c in range(classes)] for labels in (truth, prediction)]
    both = [(true & found).sum() for true, found in zip(*regions, strict=True)]
    return np.array([both, *([mask.sum() for mask in masks] for masks in regions)])


@pytest.mark.parametrize("size", [(37, 53), (60, 130), (1, 9)])
def test_boundary_counts_are_those_of_the_definition(size):
    rng = np.random.default_rng(4)
    blocks = rng.choice(np.array([0, 1, 2, 255]), size=(2, 6, 6))
    truth, prediction = (np.kron(each, np.ones((20, 24), int))[: size[0], : size[1]] for each in blocks)
    prediction[prediction == 255] = 1
    prediction[: size[0] // 2, 3:30] = 2
    counts = metrics.boundary_counts(torch.from_numpy(truth), torch.from_numpy(prediction), 3)
    assert (counts.numpy() == naive_boundary_counts(truth, prediction, 3)).all()
    right = metrics.boundary_counts(torch.from_numpy(truth), torch.from_numpy(np.where(truth < 255, truth, 1)), 3)
    assert metrics.mean_boundary_iou(right) == 100


def test_a_shifted_outline_costs_more_at_the_boundary():
    truth, prediction = torch.zeros(2, 100, 100, dtype=torch.uint8)
    truth[20:80, 20:80], prediction[20:80, 22:82] = 1, 1
    matrix = metrics.confusion_matrix(truth, prediction, 2)
    counts = metrics.boundary_counts(truth, prediction, 2)
    assert 0 < metrics.mean_boundary_iou(counts) < 0.8 * metrics.mean_iou(matrix)


def test_accuracies():
    truth, prediction = torch.tensor([0, 0, 0, 1, 255, 0]), torch.tensor([0, 0, 2, 1, 1, 0])
    matrix = metrics.confusion_matrix(truth, prediction, 3)
    assert metrics.pixel_accuracy(matrix) == 80.0
    assert metrics.mean_accuracy(matrix) == 100 * (3 / 4 + 1) / 2  # class 2 is not in the truth
