import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast.errors import UserError
from mixreorg_fast.evaluation import pictures
from mixreorg_fast.evaluation.datasets import open_dataset
from mixreorg_fast.evaluation.pictures import Row
from mixreorg_fast.evaluation.zero_shot import Segmenter, Settings
from mixreorg_fast.models.prompts import text_classifier


def test_voc_colours():
    palette = pictures.voc_palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {i: tuple(palette[i].tolist()) for i in known} == known
    assert tuple(pictures.class_palette(False)[0].tolist()) == (128, 0, 0)


def test_segment_colours_differ():
    assert len(np.unique(pictures.segment_palette()[:16], axis=0)) == 16


def test_blend_leaves_the_background_and_works_in_strips(monkeypatch):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(256, size=(50, 40, 3), dtype=np.uint8))
    labels = rng.integers(3, size=(50, 40))
    palette = pictures.class_palette(True)
    whole = np.asarray(pictures.blend(photo, labels, palette, 0.5))
    assert (whole[labels == 0] == np.asarray(photo)[labels == 0]).all()
    expected = np.asarray(photo)[labels == 1] * 0.5 + palette[1] * 0.5
    assert np.abs(whole[labels == 1] - expected).max() <= 0.5
    monkeypatch.setattr(pictures, "STRIP", 120)
    assert (np.asarray(pictures.blend(photo, labels, palette, 0.5)) == whole).all()


def test_overlay_has_a_legend_of_what_occurs():
    labels = np.zeros((60, 80), dtype=np.uint8)
    labels[:, 40:] = 2
    palette = pictures.class_palette(True)
    out = np.asarray(pictures.overlay(Image.new("RGB", (80, 60)), labels, ["background", "cat", "dog"], palette))
    below = {tuple(p) for p in out[60:].reshape(-1, 3).tolist()}
    assert tuple(palette[2].tolist()) in below and tuple(palette[1].tolist()) not in below
    assert out.shape[1] >= 80


def test_a_long_legend_wraps():
    entries = [(f"class number {i}", (i, i, i)) for i in range(30)]
    assert pictures.legend(entries, 300).height > 5 * pictures.legend(entries[:1], 300).height


def test_figures(model, tokenizer, plain, tmp_path):
    dataset = open_dataset("plain", plain)
    settings = Settings(short_side=64, background_threshold=0.4)
    segmenter = Segmenter(model, text_classifier(model, tokenizer, dataset.prompts), settings)
    pictures.dataset_figure(segmenter, dataset, tmp_path / "runs" / "segmentation.png", count=3)
    figure = Image.open(tmp_path / "runs" / "segmentation.png")
    assert figure.width == 4 * (pictures.CELL + pictures.GAP) + pictures.GAP
    assert figure.height > 3 * 100
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["segmentation.png"]  # nothing half-written stays


def test_more_than_256_labels_or_segments(tmp_path):
    many = np.arange(400).reshape(20, 20)
    classes = [f"c{i}" for i in range(400)]
    classes[0] = "background"
    row = Row(Image.new("RGB", (20, 20)), many % 200, many % 200, many)
    pictures.segmentation_figure([row], tmp_path / "a.png", classes)


def test_mixing_figure_shows_the_pixels(tmp_path):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    images = ((colours - mean) / std)[:, :, None, None].expand(-1, -1, 16, 16)
    pictures.mixing_figure(images, images.flip(0), images, tmp_path / "mixing.png")
    figure = Image.open(tmp_path / "mixing.png")
    half, step = pictures.CELL // 2, pictures.CELL + pictures.GAP
    found = [[figure.getpixel((8 + c * step + half, 34 + r * step + half)) for c in range(3)] for r in range(2)]
    red, green = (255, 0, 0), (0, 255, 0)
    assert found == [[red, green, red], [green, red, green]]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        pictures.save_png(tmp_path / "file" / "a.png", Image.new("RGB", (4, 4)))


def test_segments_figure_colours_each_segment(tmp_path):
    images = torch.zeros(2, 3, 16, 16)
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    pictures.segments_figure(images, torch.stack([left, 1 - left]).expand(2, -1, -1, -1), tmp_path / "segments.png")
    figure = np.asarray(Image.open(tmp_path / "segments.png"))
    cell = figure[60:200, pictures.CELL + 2 * pictures.GAP :]
    colours = [cell[70, place] for place in (20, pictures.CELL - 20)]
    assert not np.array_equal(*colours) and figure.shape[1] == 2 * (pictures.CELL + pictures.GAP) + pictures.GAP
