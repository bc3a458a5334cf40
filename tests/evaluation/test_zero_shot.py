import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mixreorg_fast import ops
from mixreorg_fast.config import EvalConfig, InferenceConfig, ModelConfig, TextConfig
from mixreorg_fast.errors import UserError
from mixreorg_fast.evaluation import metrics
from mixreorg_fast.evaluation.datasets import open_dataset
from mixreorg_fast.evaluation.zero_shot import evaluate, segmenter_for
from mixreorg_fast.inference.model import Model
from mixreorg_fast.inference.segmenter import Segmenter, text_classifier
from mixreorg_fast.inference.windows import Box, Decoded, decode, window_boxes
from mixreorg_fast.models.groupvit import class_scores, image_threshold

from ..inference.dense import decode_groupvit_reference
from .fakes import FakeTokenizer


def random_windows(boxes: list[Box], groups: int, classes: int, patch: int, seed: int = 0):
    """Maps ``[W, G, h, w]`` and scores ``[W, G, T]`` as a network might give them."""
    draw = torch.Generator().manual_seed(seed)
    maps = 2 * torch.randn(len(boxes), groups, boxes[0].height // patch, boxes[0].width // patch, generator=draw)
    embeddings = F.normalize(torch.randn(len(boxes), groups, 24, generator=draw), dim=-1)
    image = F.normalize(torch.randn(len(boxes), 24, generator=draw), dim=-1)
    texts = F.normalize(torch.randn(classes, 24, generator=draw), dim=-1)
    return maps.softmax(dim=1), class_scores(embeddings, image, texts, 15.0)


@pytest.mark.parametrize("threshold", [None, 0.3, 0.95])
@pytest.mark.parametrize("classes", [1, 3, 60])  # fewer than the top 5, and many more
@pytest.mark.parametrize(
    ("network", "size", "window", "stride"),
    [
        ((64, 96), (64, 96), 128, 64),  # whole; the photo as large as the network's input
        ((64, 96), (127, 181), 128, 64),  # whole, enlarged to primes
        ((64, 96), (41, 59), 128, 64),  # whole, shrunk
        ((64, 112), (131, 223), 64, 32),  # one row of windows, the last moved back, three deep
        ((80, 112), (97, 101), 64, 32),  # windows in both directions
        ((64, 64), (1, 1), 64, 64),  # one pixel
    ],
)
def test_groupvit_decoding_equals_the_dense_formula(network, size, window, stride, classes, threshold):
    boxes = window_boxes(*network, window, stride)
    maps, scores = random_windows(boxes, 6, classes, patch=8)
    expected = decode_groupvit_reference(maps, scores, boxes, network, size, threshold)
    assert torch.equal(decode(maps, scores, boxes, network, size, threshold).labels.long(), expected)


def test_strips_and_chunks_change_nothing(monkeypatch):
    boxes = window_boxes(64, 112, 64, 32)
    maps, scores = random_windows(boxes, 6, 20, patch=8)
    expected = decode(maps, scores, boxes, (64, 112), (150, 260), 0.3).labels
    monkeypatch.setattr("mixreorg_fast.inference.windows.CHUNK", 1000)
    assert torch.equal(decode(maps, scores, boxes, (64, 112), (150, 260), 0.3).labels, expected)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_direct_decoding_is_the_op(threshold):
    maps, scores = random_windows([Box(0, 0, 64, 96)], 6, 20, patch=8)
    background = None if threshold is None else image_threshold(scores, threshold)
    expected = ops.decode_segments(maps, scores, (87, 131), background_threshold=background)[0]
    decoded = decode(maps, scores, [Box(0, 0, 64, 96)], (64, 96), (87, 131), threshold, "direct")
    assert torch.equal(decoded.labels.long(), expected)


def test_direct_decoding_through_windows_averages_at_photo_size():
    network, size = (64, 112), (128, 224)
    boxes = window_boxes(*network, 64, 32)
    maps, scores = random_windows(boxes, 6, 20, patch=8)
    doubled = [Box(*(2 * side for side in box)) for box in boxes]
    expected = decode_groupvit_reference(maps, scores, doubled, size, size, 0.3)
    assert torch.equal(decode(maps, scores, boxes, network, size, 0.3, "direct").labels.long(), expected)


def test_the_two_decodings_nearly_agree():
    # Smooth maps, as a trained network's are: they differ only along the outlines.
    maps, scores = random_windows([Box(0, 0, 448, 448)], 6, 20, patch=64)
    both = [
        decode(maps, scores, [Box(0, 0, 448, 448)], (448, 448), (375, 500), 0.3, d).labels
        for d in ("groupvit", "direct")
    ]
    assert (both[0] == both[1]).float().mean() > 0.98


def test_scores_all_zero_still_give_a_class():
    # Cosines of -1 and +1 at a temperature of 100 underflow: exp(-200) is 0 in fp32.
    scores = torch.zeros(1, 3, 4)
    maps = torch.rand(1, 3, 4, 4)
    assert decode(maps, scores, [Box(0, 0, 32, 32)], (32, 32), (50, 50)).labels.unique().tolist() == [0]


def test_segments_of_windows_divide_the_photo_at_the_middle_of_overlaps():
    boxes = window_boxes(64, 112, 64, 32)
    maps, scores = random_windows(boxes, 4, 3, patch=8)
    decoded = decode(maps, scores, boxes, (64, 112), (64, 112))
    assert (decoded.count, decoded.windows) == (4 * 3, 3)
    owner = decoded.segments // 4
    assert [int(w) for w in owner[0].unique_consecutive()] == [0, 1, 2]
    # Windows start at 0, 32 and 48: the overlaps 32..64 and 48..96 are halved.
    assert [i for i, (a, b) in enumerate(pairwise(owner[0].tolist()), 1) if a != b] == [48, 72]


def test_photos_above_the_bound_are_decoded_smaller(monkeypatch):
    maps, scores = random_windows([Box(0, 0, 64, 64)], 4, 6, patch=8)
    arguments = (maps, scores, [Box(0, 0, 64, 64)], (64, 64), (600, 600), 0.3, "direct")
    exact = decode(*arguments).labels
    monkeypatch.setattr("mixreorg_fast.inference.windows.MAX_DECODED", 150 * 150)
    assert (decode(*arguments).labels == exact).float().mean() > 0.97


@pytest.mark.parametrize(
    ("height", "width", "window", "stride"),
    [(448, 592, 448, 224), (448, 448, 448, 224), (700, 448, 448, 224), (96, 97, 40, 40), (20, 30, 448, 224)],
)
def test_windows_cover_every_pixel(height, width, window, stride):
    covered = torch.zeros(height, width, dtype=torch.int64)
    boxes = window_boxes(height, width, window, stride)
    for top, left, h, w in boxes:
        assert 0 <= top <= height - h and 0 <= left <= width - w
        covered[top : top + h, left : left + w] += 1
    assert covered.min() == 1
    assert len(set(boxes)) == len(boxes)
    assert len({(box.height, box.width) for box in boxes}) == 1


def test_class_scores_are_the_formula():
    draw = torch.Generator().manual_seed(0)
    embeddings, image, texts = (F.normalize(torch.randn(n, 12, generator=draw), dim=-1) for n in (8, 1, 9))
    scores = class_scores(embeddings[None], image, texts, 7.0)[0]
    top = (image @ texts.T)[0].argsort(descending=True)[:5]
    for g in range(8):
        exps = {t: float(torch.exp(7.0 * embeddings[g] @ texts[t])) for t in range(9)}
        for t in range(9):
            inside = exps[t] / sum(exps[int(u)] for u in top) if t in top.tolist() else 0.0
            assert float(scores[g, t]) == pytest.approx(inside * exps[t] / sum(exps.values()), abs=1e-6)


def test_the_surest_segment_is_never_background():
    scores = torch.tensor([[[0.2, 0.1], [0.4, 0.3]], [[0.97, 0.1], [0.3, 0.2]]])
    torch.testing.assert_close(image_threshold(scores, 0.95), torch.tensor([0.4, 0.95]))


SETTINGS = InferenceConfig(short_side=64, window=64, stride=32, background_threshold=0.4)


@pytest.mark.parametrize("mode", ["whole", "sliding"])
@pytest.mark.parametrize("decoding", ["groupvit", "direct"])
def test_evaluation_is_the_sum_over_photos(model, plain, mode, decoding):
    """Against the protocol written out photo by photo, with the dense decoding; batches must not matter."""
    dataset = open_dataset("plain", plain)
    settings = SETTINGS.with_options(mode=mode, decoding=decoding)
    segmenter = segmenter_for(model, dataset, settings)
    result = evaluate(segmenter, dataset, progress=False)
    singly = evaluate(segmenter_for(model, dataset, settings, batch=1), dataset, progress=False)
    assert result == singly | {"settings": result["settings"]}
    matrix, whole = torch.zeros(2, 4, 4, dtype=torch.int64)
    for sample in dataset:
        pixels = segmenter.tensor(sample.image)
        network = tuple(pixels.shape[1:])
        boxes = window_boxes(*network, 64, 32) if mode == "sliding" else [Box(0, 0, *network)]
        seen = [model.segments(pixels[None, :, t : t + h, x : x + w]) for t, x, h, w in boxes]
        scores = torch.cat([class_scores(s.embeddings, s.image, segmenter.texts, 10.0) for s in seen]).detach()
        maps = torch.cat([s.maps for s in seen]).detach()
        if decoding == "groupvit":
            labels = decode_groupvit_reference(maps, scores, boxes, network, sample.mask.shape, 0.4)
        else:
            labels = decode(maps, scores, boxes, network, sample.mask.shape, 0.4, "direct").labels
        truth = torch.from_numpy(sample.mask)
        matrix += metrics.confusion_matrix(truth, labels, 4)
        name = torch.stack([s.image[0] @ segmenter.texts.T for s in seen]).mean(dim=0).argmax() + 1
        whole += metrics.confusion_matrix(truth, torch.full_like(truth, name), 4)
    assert result["whole_photo_mIoU"] == pytest.approx(metrics.mean_iou(whole), abs=1e-9)
    assert result["mIoU"] == pytest.approx(metrics.mean_iou(matrix), abs=1e-9)
    assert list(result["per_class"]) == ["background", "cat", "dog", "red car"]
    assert result["images"] == 7
    assert 1 <= result["groups_used"] <= 5
    assert result["oracle_mIoU"] >= result["mIoU"]
    shown = [set(dataset[number].mask.ravel().tolist()) for number in range(7)]
    assert list(result["per_class_images"].values()) == [sum(c in photo for photo in shown) for c in range(4)]
    assert "frequent_mIoU" not in result
    assert result["settings"]["background_threshold"] == 0.4


def test_limit_spreads_over_the_split(model, plain, monkeypatch):
    dataset = open_dataset("plain", plain)
    read = []
    inner = dataset._paths
    dataset._paths = lambda name: (read.append(name), inner(name))[1]
    result = evaluate(segmenter_for(model, dataset, SETTINGS), dataset, limit=3, progress=False)
    assert result["images"] == 3
    assert sorted(read) == ["photo0", "photo2", "photo4"]


def test_an_interrupted_evaluation_goes_on(model, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("mixreorg_fast.evaluation.zero_shot.SAVE_EVERY", -1.0)
    keep, dataset = tmp_path / "eval.json.partial", open_dataset("plain", plain)
    segmenter = segmenter_for(model, dataset, SETTINGS, batch=1)
    whole = evaluate(segmenter, dataset, progress=False)
    inner, read = dataset._paths, []

    def paths(name: str):
        read.append(name)
        if len(read) == 5:
            raise KeyboardInterrupt
        return inner(name)

    dataset._paths = paths
    with pytest.raises(KeyboardInterrupt):
        evaluate(segmenter, dataset, progress=False, keep=keep)
    read[:] = [None] * 5  # from here on nothing interrupts
    assert evaluate(segmenter, dataset, progress=False, keep=keep, resume=True) == whole
    assert 0 < len(read) - 5 < 7
    assert not list(tmp_path.glob("*.partial*"))


def test_counts_of_another_model_are_not_gone_on_from(model, plain, tmp_path):
    about = {"model": 1.0}
    tally = metrics.Tally(4)
    decoded = Decoded(torch.ones(2, 2), torch.zeros(2, 2), 1, 1, torch.zeros(1, 4))
    tally.add(3, torch.zeros(2, 2, dtype=torch.uint8), decoded)
    tally.keep(tmp_path / "counts", about)
    same, other = metrics.Tally(4), metrics.Tally(4)
    same.restore(tmp_path / "counts", about)
    other.restore(tmp_path / "counts", {"model": 2.0})
    assert (same.done, same.images, other.done, other.images) == ({3}, 1, set(), 0)
    (tmp_path / "counts").write_bytes(b"half a fi")
    other.restore(tmp_path / "counts", about)
    assert not other.done


def test_predictions_are_written_as_palette_pngs(model, plain, tmp_path):
    dataset = open_dataset("plain", plain)
    segmenter = segmenter_for(model, dataset, SETTINGS)
    result = evaluate(segmenter, dataset, progress=False, predictions=tmp_path / "p")
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    for sample in dataset:
        with Image.open(tmp_path / "p" / f"{sample.name}.png") as picture:
            assert picture.mode == "P"
            labels = torch.from_numpy(np.array(picture))
        matrix += metrics.confusion_matrix(torch.from_numpy(sample.mask), labels, 4)
    assert metrics.mean_iou(matrix) == result["mIoU"]


@pytest.mark.launch
def test_largest_photos_of_150_classes_stay_within_memory():
    """ADE20K's largest are about 6 megapixels: the process, PyTorch included, stays under 2 GiB."""
    code = """
import resource, torch
torch.set_num_threads(1)
from mixreorg_fast.inference.windows import decode, window_boxes
for decoding in ("groupvit", "direct"):
    boxes = window_boxes(448, 672, 448, 224)
    maps, scores = torch.randn(len(boxes), 8, 28, 28).softmax(1), torch.rand(len(boxes), 8, 150)
    decode(maps, scores, boxes, (448, 672), (2100, 3000), None, decoding)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048, f"{done.stdout.strip()} MiB"


def test_with_a_real_model():
    torch.manual_seed(0)
    text = TextConfig(width=16, heads=2, layers=1, context=40, vocab_size=256)
    config = ModelConfig(
        image_size=32, patch_size=8, width=32, heads=2, depths=(1, 1, 1), groups=(8, 4), embed_dim=16,
        projection_hidden=32, text=text,
    )  # fmt: skip
    model = Model(config, tokenizer=FakeTokenizer()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    names = ["cat", "dog", "sky"]
    texts = text_classifier(model, names)
    settings = InferenceConfig(short_side=64, decoding="direct")
    segmenter = Segmenter(model, names, settings)
    pixels = torch.randn(2, 3, 64, 88)
    decoded = list(segmenter(pixels, [(64, 88)] * 2))
    expected = model.segment_labels(pixels, texts)
    assert torch.equal(torch.stack([d.labels for d in decoded]).long(), expected)


def test_settings_come_from_the_configuration():
    settings = EvalConfig(short_side=96, templates=["a {}", "the {}"]).with_options(background_threshold=0.5)
    assert (settings.short_side, settings.templates, settings.background_threshold) == (96, ("a {}", "the {}"), 0.5)
    assert EvalConfig().with_options() == InferenceConfig()
    assert type(settings) is InferenceConfig


def test_the_data_set_decides_about_background(model, plain):
    def threshold(*settings) -> float | None:
        return segmenter_for(model, open_dataset("plain", plain), *settings).settings.background_threshold

    assert threshold() == threshold(InferenceConfig()) == 0.95
    assert threshold(SETTINGS) == 0.4
    assert threshold(SETTINGS, 0.0) == 0.0
    (plain / "classes.txt").write_text("sky\ncat\ndog\nred car\n")
    # The weights' threshold does not apply; an explicit threshold is refused.
    assert threshold(SETTINGS) is None
    with pytest.raises(UserError, match="no class 'background' .its first is 'sky'"):
        threshold(SETTINGS, 0.4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 500}, "stride 500 leaves gaps between windows of 448"),
        ({"short_side": 0}, "short_side: input should be greater than 0, got 0"),
        ({"mode": "slide"}, "mode: 'slide' is not a valid choice .did you mean 'sliding'"),
        ({"decoding": "dense"}, "decoding: 'dense' is not a valid choice .choose from: groupvit, direct"),
        ({"templates": "a photo"}, "templates: 'a photo' is neither a set of templates nor a template with {}"),
        ({"short": 1}, "unknown key 'short'"),
        ({"background_threshold": 1.5}, "background_threshold: input should be less than or equal to 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        InferenceConfig().with_options(**values)


def test_a_window_that_cuts_patches_is_refused(model):
    with pytest.raises(UserError, match="window 60 is not a multiple of the patch 8 .nearest: 56 or 64"):
        Segmenter(model, ["cat"], InferenceConfig(mode="sliding", window=60, stride=30))


def test_labels_reach_numpy_small(model):
    decoded = Segmenter(model, ["cat", "dog"], SETTINGS).segment(Image.new("RGB", (50, 40), "red"))
    assert decoded.labels.numpy().dtype == np.uint8
    assert decoded.labels.shape == decoded.segments.shape == (40, 50)
