"""Each file of examples/ runs as its first lines say."""

import ast
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.evaluation.datasets import open_dataset
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


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with `weights/` and photo.jpg."""
    tokenizer = Tokenizer.train(["a photo of a cat and a dog"] * 3, 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model
    model = Model(config, tokenizer=tokenizer)
    fill(model)
    model.save(tmp_path / "weights")
    draw_photo(tmp_path / "photo.jpg", (64, 48), seed=0)
    return tmp_path


def test_segmenting_a_photo(place, capsys):
    options = ["--weights", str(place / "weights"), "--classes", "cat, dog", "--out", str(place / "overlay.png")]
    areas = main_of("segment_photo.py")([str(place / "photo.jpg"), *options])
    assert list(areas) == ["cat", "dog"] and sum(areas.values()) == pytest.approx(1)
    assert Image.open(place / "overlay.png").width >= 64
    assert capsys.readouterr().out.startswith("cat: ")


def test_the_notebook(place, capsys):
    """Cell by cell, with a folder of weights in place of the id on the hub."""
    cells = json.loads((EXAMPLES / "segment_by_names.ipynb").read_text())["cells"]
    names, shown = {}, []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        lines = ast.parse("".join(cell["source"])).body
        last = lines.pop() if isinstance(lines[-1], ast.Expr) else None
        exec(compile(ast.Module(lines, []), "cell", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names["WEIGHTS"] == "nvidia/groupvit-gcc-yfcc"
            names |= {"WEIGHTS": str(place / "weights"), "PHOTO": str(place / "photo.jpg")}
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert "of the photo" in capsys.readouterr().out
    first, with_background, (shape, found) = shown
    assert first.width >= 64 and with_background.width >= 64
    assert shape == (48, 64) and set(found) <= {"background", "cat", "sofa", "remote control"}


def test_masks_of_pascal_context(tmp_path, capsys):
    scipy_io = pytest.importorskip("scipy.io")
    for folder in ("trainval", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a", "b"):
        draw_photo(tmp_path / "JPEGImages" / f"{name}.jpg", (3, 2), seed=0)
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\nb\n")  # b is not annotated
    labels = np.array([[0, 1, 2], [9, 458, 459]], np.uint16)
    scipy_io.savemat(tmp_path / "trainval" / "a.mat", {"LabelMap": labels})
    (tmp_path / "labels.txt").write_text("\n".join(f"{number}: thing {number}" for number in range(1, 460)))
    main_of("pascal_context.py")([str(tmp_path)])
    assert capsys.readouterr().out == "val: 1 photos\n"
    frequent, full = (open_dataset(kind, tmp_path) for kind in ("context", "context459"))
    assert frequent.names == full.names == ["a"]
    shown = [frequent.classes[label] for label in frequent[0].mask.ravel()]
    assert shown == ["background", "background", "airplane", "bag", "wood", "background"]
    assert full[0].mask.tolist() == [[65535, 0, 1], [8, 457, 458]]
