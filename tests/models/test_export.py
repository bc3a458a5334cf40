"""`mixreorg export`: programs that compute what the model does, at any sizes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import mixreorg_fast
from mixreorg_fast.cli import main
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.inference.model import Model

from ..tiny import fill, tiny_config

ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
# Photos, their height and width in pixels, classes; prompts and their tokens.
SIZES = [((2, 32, 32, 3), (2, 12)), ((1, 48, 24, 1), (5, 4)), ((3, 16, 56, 7), (1, 7))]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "weights"
    captions = ["a red ball on grass", "two dogs and a cat", "a plain blue box"] * 5
    tokenizer = Tokenizer.train(captions, 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size}}).model
    model = Model(config, mean=(0.4, 0.5, 0.3), std=(0.2, 0.3, 0.25), tokenizer=tokenizer).eval()
    fill(model)
    model.save(folder)
    return folder


def runners(folder, kind: str):
    """The programs of a folder, as functions of tensors."""
    if kind == "torch":
        return [torch.export.load(folder / f"{name}.pt2").module() for name in ("image", "text")]
    import onnxruntime

    def runner(name: str):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]

        def run(*inputs: Tensor):
            feed = dict(zip(names, (x.numpy() for x in inputs), strict=True))
            outputs = [torch.from_numpy(x) for x in session.run(None, feed)]
            return outputs if len(outputs) > 1 else outputs[0]

        return run

    return [runner("image"), runner("text")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["torch", pytest.param("onnx", marks=pytest.mark.skipif(not ONNX, reason="needs the extra onnx"))]
)
def test_programs_compute_what_the_model_does(kind, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(weights.parent)
    out = Path(f"weights-{kind}")
    assert main(["export", "weights", "--to", kind]) == 0
    suffix = {"onnx": "onnx", "torch": "pt2"}[kind]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"image.{suffix}", f"text.{suffix}", "model.json", "tokenizer.json"]
    )
    assert json.loads((out / "model.json").read_text())["mean"] == [0.4, 0.5, 0.3]
    image_program, text_program = runners(out, kind)
    model = mixreorg_fast.load(weights)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.mean, model.std))
    generator = torch.Generator().manual_seed(5)
    for (photos, height, width, classes), (prompts, tokens) in SIZES:
        images = torch.rand(photos, 3, height, width, generator=generator)
        texts = torch.nn.functional.normalize(torch.randn(classes, 16, generator=generator), dim=-1)
        seen = model.segments((images - mean) / std)
        for threshold in (0.0, 0.5):
            labels, scores, maps = image_program(images, 3 * texts, torch.tensor(threshold))
            truth = model.segment_labels((images - mean) / std, texts, background_threshold=threshold)
            assert labels.dtype == torch.int64 and torch.equal(labels, truth)
            assert (maps - seen.maps).abs().max() < 1e-4
            assert scores.shape == (photos, 3, classes)
        ids = torch.randint(1, model.config.text.vocab_size - 1, (prompts, tokens), generator=generator)
        ids[torch.arange(prompts), torch.randint(tokens, (prompts,), generator=generator)] = (
            model.config.text.vocab_size - 1
        )
        embeddings = text_program(ids)
        assert (embeddings - model.text_embeddings(ids, normalise=False)).abs().max() < 1e-4
    if kind == "onnx":
        Image.new("RGB", (50, 40), "red").save("photo.jpg")
        page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
        (example,) = [x for x in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "onnx" in x]
        names = {}
        exec(example, names)
        assert names["labels"].shape == (1, 448, 640)
        found = torch.nn.functional.normalize(torch.from_numpy(names["texts"]), dim=1)
        segmenter = model.segmenter(["cat", "dog", "sofa"], templates="a photo of a {}.")
        assert torch.allclose(found, segmenter.texts, atol=1e-4)


def test_refusals_are_one_line(weights, tmp_path, capsys, monkeypatch):
    def refusal(*arguments) -> str:
        assert main(["export", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not an empty folder" in refusal(weights, "--out", tmp_path / "full")
    assert str(tmp_path / "none") in refusal(tmp_path / "none", "--to", "torch", "--out", tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert "pip install '.[onnx]'" in refusal(weights, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
