"""Each file of examples/ runs as its first lines say."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.inference.model import Model
from tests.evaluation.fakes import draw_photo
from tests.tiny import fill, tiny_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.slow
def test_the_toy_learns(device):
    losses = main_of("fast_ops.py")(["--steps", "60", "--device", str(device)])
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_segmenting_a_photo(tmp_path, capsys):
    tokenizer = Tokenizer.train(["a photo of a cat and a dog"] * 3, 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model
    model = Model(config, tokenizer=tokenizer)
    fill(model)
    model.save(tmp_path / "weights")
    draw_photo(tmp_path / "photo.jpg", (64, 48), seed=0)
    options = ["--weights", str(tmp_path / "weights"), "--classes", "cat, dog", "--out", str(tmp_path / "overlay.png")]
    areas = main_of("segment_photo.py")([str(tmp_path / "photo.jpg"), *options])
    assert list(areas) == ["cat", "dog"] and sum(areas.values()) == pytest.approx(1)
    assert Image.open(tmp_path / "overlay.png").width >= 64
    assert capsys.readouterr().out.startswith("cat: ")
