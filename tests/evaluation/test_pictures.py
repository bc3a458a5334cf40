import numpy as np
import torch
from PIL import Image

from mixreorg_fast.config import InferenceConfig
from mixreorg_fast.evaluation import pictures
from mixreorg_fast.evaluation.datasets import open_dataset
from mixreorg_fast.evaluation.zero_shot import segmenter_for
from mixreorg_fast.images import IMAGENET_MEAN, IMAGENET_STD


def test_figures(model, plain, tmp_path):
    dataset = open_dataset("plain", plain)
    settings = InferenceConfig(short_side=64, background_threshold=0.4)
    segmenter = segmenter_for(model, dataset, settings)
    pictures.dataset_figure(segmenter, dataset, tmp_path / "runs" / "segmentation.png", count=3)
    figure = Image.open(tmp_path / "runs" / "segmentation.png")
    assert figure.width == 4 * (pictures.CELL + pictures.GAP) + pictures.GAP
    assert figure.height > 3 * 100
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["segmentation.png"]  # nothing half-written stays


def test_more_than_256_labels_or_segments(tmp_path):
    many = np.arange(400).reshape(20, 20)
    classes = [f"c{i}" for i in range(400)]
    classes[0] = "background"
    row = (Image.new("RGB", (20, 20)), many % 200, many % 200, many)
    pictures.segmentation_figure([row], tmp_path / "a.png", classes)


def test_mixing_figure_shows_the_pixels(tmp_path):
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    images = ((colours - mean) / std)[:, :, None, None].expand(-1, -1, 16, 16)
    pictures.mixing_figure(images, images.flip(0), images, tmp_path / "mixing.png", IMAGENET_MEAN, IMAGENET_STD)
    figure = Image.open(tmp_path / "mixing.png")
    half, step = pictures.CELL // 2, pictures.CELL + pictures.GAP
    found = [[figure.getpixel((8 + c * step + half, 34 + r * step + half)) for c in range(3)] for r in range(2)]
    red, green = (255, 0, 0), (0, 255, 0)
    assert found == [[red, green, red], [green, red, green]]


def test_segments_figure_colours_each_segment(tmp_path):
    images = torch.zeros(2, 3, 16, 16)
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    maps = torch.stack([left, 1 - left]).expand(2, -1, -1, -1)
    pictures.segments_figure(images, maps, tmp_path / "segments.png", IMAGENET_MEAN, IMAGENET_STD)
    figure = np.asarray(Image.open(tmp_path / "segments.png"))
    cell = figure[60:200, pictures.CELL + 2 * pictures.GAP :]
    colours = [cell[70, place] for place in (20, pictures.CELL - 20)]
    assert not np.array_equal(*colours) and figure.shape[1] == 2 * (pictures.CELL + pictures.GAP) + pictures.GAP
