"""``evaluate --model``: functions, Hugging Face's models, and what is refused."""

import json
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mixreorg_fast.cli import main
from mixreorg_fast.evaluation.datasets import open_dataset
from mixreorg_fast.evaluation.predictors import CLASSES_AT_ONCE, open_model
from mixreorg_fast.evaluation.zero_shot import evaluate

FUNCTIONS = """
import numpy as np
import torch

def colours(photo, classes):  # a label per pixel by its colour
    return (np.asarray(photo).sum(axis=2) // 7 % len(classes)).astype(np.uint16)

def full(photo, classes):  # scores of every class, the background's too, at a smaller size
    pixels = torch.from_numpy(np.array(photo.resize((16, 12)))).permute(2, 0, 1) / 255
    return torch.cat([pixels, pixels[:1] * 0.5])[: len(classes)]

def bare(photo, classes):  # scores without the background
    return full(photo, classes)[: len(classes) - 1].numpy()

class Model:
    def one(self, photo, classes):
        return np.zeros((photo.height, photo.width), int)

model = Model()
number = 3

def transposed(photo, classes):
    return colours(photo, classes).T

def floats(photo, classes):
    return colours(photo, classes).astype(float)

def few(photo, classes):
    return np.zeros((2, 5, 5))

def high(photo, classes):
    return colours(photo, classes) + len(classes)

def nan(photo, classes):
    return full(photo, classes) * float("nan")

def text(photo, classes):
    return "cat"

def failing(photo, classes):
    raise KeyError("weights")
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "p4_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "p4_functions", raising=False)
    return "p4_functions"


def score(name: str, dataset, options: dict | None = None, **arguments) -> dict:
    return evaluate(open_model(name, dataset, options or {}), dataset, progress=False, **arguments)


def test_functions_of_labels_and_of_scores(functions, plain, tmp_path, capsys):
    dataset = open_dataset("plain", plain)
    out = tmp_path / "eval.json"
    arguments = ["--model", f"{functions}:colours", "--root", str(plain), "--out", str(out)]
    assert main(["evaluate", *arguments, "--predictions", str(tmp_path / "p"), "--pictures", "p.png"]) == 0
    result = json.loads(out.read_text())
    assert result["images"] == 7 and result["settings"]["model"] == f"{functions}:colours"
    assert "oracle_mIoU" not in result and "groups_used" not in result
    assert "boundary mIoU" in capsys.readouterr().out
    for sample in dataset:
        labels = np.asarray(Image.open(tmp_path / "p" / f"{sample.name}.png"))
        assert (labels == np.asarray(sample.image).sum(axis=2) // 7 % 4).all()

    sys.path.insert(0, "")
    import p4_functions

    full, bare = (
        open_model(f"{functions}:{name}", dataset, {"background_threshold": 0.6}) for name in ("full", "bare")
    )
    image = dataset[1].image
    scores = F.interpolate(p4_functions.full(image, range(4))[None], (61, 50), mode="bilinear")[0]
    assert torch.equal(full.segment(image).labels.long(), scores.argmax(dim=0))
    best, label = scores[:3].max(dim=0)
    expected = torch.where(best < min(0.6, float(best.max())), 0, label + 1)
    assert torch.equal(bare.segment(image).labels.long(), expected) and set(expected.unique().tolist()) >= {0, 1}
    # The sweep tells the score at each threshold, and the score itself stays at the dataset's.
    swept = score(f"{functions}:bare", dataset, sweep=True)
    assert swept["settings"]["background_threshold"] == 0.95 and len(swept["threshold_sweep"]) == 21
    for threshold in ("0.35", "0.60"):
        again = score(f"{functions}:bare", dataset, {"background_threshold": float(threshold)})
        assert swept["threshold_sweep"][threshold] == again["mIoU"]
    assert swept["mIoU"] == swept["threshold_sweep"]["0.95"] <= max(swept["threshold_sweep"].values())
    assert score(f"{functions}:model.one", dataset)["mIoU"] == swept["all_background_mIoU"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere_at_all:f", [], "nowhere_at_all:f: module nowhere_at_all cannot be imported (No module named"),
        ("{}:colour", [], "no colour in module p4_functions (did you mean 'colours'?)"),
        ("{}:number", [], "number is of type int; a function was expected"),
        (
            "{}:transposed",
            [],
            "[64, 48] for a photo of 64 x 48; expected integer labels [48, 64], or floats [T, h, w] with",
        ),
        ("{}:floats", [], "gave float64 [48, 64]"),
        ("{}:few", [], "gave float64 [2, 5, 5] for a photo of 64 x 48"),
        ("{}:few", [], "T = 4 (or 3, without the background)"),
        ("{}:high", [], "the 4 classes are 0 to 3"),
        ("{}:nan", [], "scores that are not numbers"),
        ("{}:text", [], "gave str; an array or tensor was expected"),
        ("{}:failing", [], "failed with KeyError: 'weights' (see --debug)"),
        ("{}:full", ["--background-threshold", "sweep"], "a threshold sweep needs a model that gives scores without"),
        ("{}:full", ["--short-side", "64"], "--short-side does not apply: the model prepares its photos"),
        ("{}:full", ["--background-threshold", "often"], "invalid threshold value: 'often'"),
    ],
)
def test_functions_are_refused_in_one_line(functions, plain, tmp_path, capsys, model, options, message):
    out = tmp_path / "eval.json"
    arguments = ["--root", str(plain), "--out", str(out), *options]
    assert main(["evaluate", "--model", model.format(functions), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not out.exists()


def test_a_sweep_of_our_weights_is_that_of_single_thresholds(model, plain, monkeypatch):
    from mixreorg_fast.config import InferenceConfig
    from mixreorg_fast.evaluation.zero_shot import segmenter_for

    dataset = open_dataset("plain", plain)
    for mode in ("whole", "sliding"):
        settings = InferenceConfig(short_side=64, mode=mode, window=64, stride=32, background_threshold=0.4)
        swept = evaluate(segmenter_for(model, dataset, settings), dataset, progress=False, sweep=True)
        single = evaluate(segmenter_for(model, dataset, settings), dataset, progress=False)
        assert {name: swept[name] for name in single} == single
        for threshold in (0.1, 0.15, 0.2, 0.4):
            again = evaluate(segmenter_for(model, dataset, settings, threshold), dataset, progress=False)
            assert again["mIoU"] == swept["threshold_sweep"][f"{threshold:.2f}"]
        best = max(swept["threshold_sweep"].values())
        assert swept["threshold_sweep"][f"{swept['best_threshold']:.2f}"] == best
    (plain / "classes.txt").write_text("sky\ncat\ndog\nred car\n")
    arguments = ["evaluate", "--model", "x", "--root", str(plain), "--background-threshold", "sweep"]
    assert main(arguments) == 2


# ---------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    """A folder with a tiny CLIPSeg of random weights, and its processor."""
    transformers = pytest.importorskip("transformers", reason="needs the Hugging Face extra")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = Tokenizer(models.BPE(unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[start, end], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["a photo of a cat", "a red car and a dog"], trainer)
    ids = {token: backend.token_to_id(token) for token in (start, end)}
    backend.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=list(ids.items()))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, unk_token=end, pad_token=end
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    special = {"bos_token_id": ids[start], "eos_token_id": ids[end], "pad_token_id": ids[end]}
    texts = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 20}
    config = transformers.CLIPSegConfig(
        text_config={**sizes, **special, **texts, "num_hidden_layers": 1},
        vision_config={**sizes, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        projection_dim=12, extract_layers=[0, 1, 2], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPSegForImageSegmentation(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clipseg") / "model"
    model.save_pretrained(folder)
    images = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    transformers.CLIPSegProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clipseg_scores_are_those_of_transformers(clipseg, plain, tmp_path, capsys):
    import transformers

    dataset = open_dataset("plain", plain)
    predictor = open_model(
        str(clipseg), dataset, {"background_threshold": 0.55, "templates": "a photo of a {}."}, "cpu"
    )
    processor = transformers.AutoProcessor.from_pretrained(clipseg)
    model = transformers.CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()
    sample = dataset[1]
    prompts = [f"a photo of a {name}." for name in ("cat", "dog", "red car")]
    inputs = processor(text=prompts, images=[sample.image] * 3, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.sigmoid()
    best, label = F.interpolate(scores[None], sample.mask.shape, mode="bilinear")[0].max(dim=0)
    expected = torch.where(best < min(0.55, float(best.max())), 0, label + 1)
    assert len(expected.unique()) > 1
    assert (predictor.segment(sample.image).labels == expected).float().mean() > 0.999  # rounding at equal scores

    out = tmp_path / "eval.json"
    arguments = ["evaluate", "--model", str(clipseg), "--root", str(plain), "--device", "cpu", "--out", str(out)]
    assert main([*arguments, "--background-threshold", "sweep", "--templates", "imagenet7"]) == 0
    result = json.loads(out.read_text())
    assert result["settings"]["background_threshold"] == 0.5 and len(result["settings"]["templates"]) == 7
    assert result["mIoU"] == result["threshold_sweep"]["0.50"]
    best = result["best_threshold"]
    assert f"best of 21 background thresholds: {best:.2f} with" in capsys.readouterr().out
    assert main([*arguments, "--mode", "sliding"]) == 2
    assert "--mode does not apply" in capsys.readouterr().err


def test_clipseg_by_name(clipseg, plain, tmp_path, hub, capsys, monkeypatch):
    """From the hub, and from its cache without network; what the hub refuses is said in its own words."""
    hub.add("owner/clipseg", clipseg).tag("v1")
    hub.add("owner/bert", {"config.json": b'{"model_type": "bert"}'})
    out = tmp_path / "eval.json"
    arguments = ["--root", str(plain), "--device", "cpu", "--limit", "2", "--out", str(out)]
    scores = []
    for name in (str(clipseg), "owner/clipseg", "owner/clipseg@v1"):
        assert main(["evaluate", "--model", name, *arguments]) == 0
        scores.append(json.loads(out.read_text()))
        assert scores[-1].pop("settings")["model"] == name
    assert scores[0] == scores[1] == scores[2]
    capsys.readouterr()

    def refusal(name: str) -> str:
        assert main(["evaluate", "--model", name, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "'bert' is not supported" in refusal("owner/bert")
    assert "no repository owner/none on http" in refusal("owner/none")
    hub.add("owner/gated", clipseg, gated=True)
    assert "owner/gated is gated: accept its conditions on" in refusal("owner/gated")
    hub.add("owner/bare", {"config.json": b'{"model_type": "clipseg"}'})
    assert "owner/bare holds no weights of a CLIPSeg" in refusal("owner/bare")
    for constant, value, reason in (
        ("ENDPOINT", "http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached"),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
    ):
        with monkeypatch.context() as context:
            context.setattr(huggingface_hub.constants, constant, value)
            assert reason in refusal("owner/unseen")
            assert main(["evaluate", "--model", "owner/clipseg@v1", *arguments]) == 0
            said = capsys.readouterr().err
            assert (reason in said) == (constant == "ENDPOINT") == ("the copy in the cache is used" in said)
        assert json.loads(out.read_text())["mIoU"] == scores[0]["mIoU"]


def test_clipseg_takes_more_classes_than_are_held_at_once(clipseg, plain):
    names = [f"thing {number}" for number in range(CLASSES_AT_ONCE + 9)]
    (plain / "classes.txt").write_text("\n".join(names))
    predictor = open_model(str(clipseg), open_dataset("plain", plain), {}, "cpu")
    inputs = torch.randn(1, 3, 32, 32)
    (scores,) = predictor.outputs(inputs, [(40, 30)])
    assert scores.shape == (len(names), 32, 32)
    expected = F.interpolate(scores[None], (40, 30), mode="bilinear")[0].argmax(dim=0)
    (decoded,) = predictor(inputs, [(40, 30)])
    assert torch.equal(decoded.labels.long(), expected) and expected.max() >= CLASSES_AT_ONCE


def test_other_model_types_and_damaged_folders_are_refused(clipseg, plain, tmp_path, capsys):
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert main(["evaluate", "--model", str(folder), "--root", str(plain)]) == 2
    error = capsys.readouterr().err
    assert "a model of type 'vit' is not supported (choose from: weights of ours, groupvit, clipseg" in error
    (folder / "config.json").write_text('{"model_type": "clipseg"}')
    assert main(["evaluate", "--model", str(folder), "--root", str(plain)]) == 2
    assert "not readable as CLIPSeg" in capsys.readouterr().err
