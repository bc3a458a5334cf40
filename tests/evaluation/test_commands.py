import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast.cli import main
from mixreorg_fast.config import ModelConfig, TextConfig
from mixreorg_fast.data.tokenizer import Tokenizer
from mixreorg_fast.models import GroupViT
from mixreorg_fast.models.weights import save

from .fakes import draw_photo


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights with a tokenizer."""
    tokenizer = Tokenizer.train(["a photo of a cat and a dog", "a red car on the road"] * 3, 300)
    text = TextConfig(width=16, heads=2, layers=1, context=24, vocab_size=tokenizer.vocab_size)
    config = ModelConfig(
        image_size=32, patch_size=8, width=32, heads=2, depths=(1, 1, 1), groups=(8, 4), embed_dim=16,
        projection_hidden=32, text=text,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GroupViT(config, tokenizer=tokenizer)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("weights") / "w"
    save(model, folder)
    return str(folder)


def test_evaluate(weights, plain, tmp_path, capsys):
    out, figure = tmp_path / "out" / "eval.json", tmp_path / "out" / "seg.png"
    options = ["--dataset", "plain", "--root", str(plain), "--short-side", "48", "--templates", "imagenet7"]
    code = main(["evaluate", "--weights", weights, *options, "--out", str(out), "--pictures", str(figure)])
    assert code == 0
    result = json.loads(out.read_text())
    assert set(result) == {
        "mIoU", "per_class", "per_class_images", "all_background_mIoU", "oracle_mIoU", "groups_used", "images",
        "settings",
    }  # fmt: skip
    assert list(result["per_class"]) == ["background", "cat", "dog", "red car"]
    assert result["images"] == 7 and 0 <= result["mIoU"] <= 100
    assert result["settings"]["short_side"] == 48 and len(result["settings"]["templates"]) == 7
    printed = capsys.readouterr().out
    assert f"mIoU {result['mIoU']:.2f} % over 7 photos" in printed and "red car" in printed
    assert Image.open(figure).width > 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "voc"], "unknown data set layout 'voc'"),
        (["--split", "vla"], "did you mean 'val'"),
        (["--resume"], "--resume needs --out FILE"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--templates", "imagenet"], "did you mean 'imagenet7'"),
        (["--device", "nowhere"], "--device nowhere: not available"),
        (["--mode", "sliding", "--window", "100", "--stride", "50"], "no multiple of the patch 8"),
    ],
)
def test_evaluate_refuses_in_one_line(weights, plain, capsys, options, message):
    assert main(["evaluate", "--weights", weights, "--root", str(plain), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().splitlines()[-1].startswith("error: ")


def evaluate_on_two_ranks(weights, plain, out):
    root = str(Path(__file__).parents[2])
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "mixreorg_fast.cli", "evaluate"]
    options = ["--weights", weights, "--root", str(plain), "--short-side", "48", "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *options], env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout, done.stderr


def test_evaluate_on_two_ranks(weights, plain, tmp_path):
    """The launcher's ranks share the photos; the first alone speaks and writes; a bad photo is named by its rank."""
    out = tmp_path / "both.json"
    code, printed, error = evaluate_on_two_ranks(weights, plain, out)
    assert code == 0, error
    assert printed.count("over 7 photos") == 1
    options = ["--root", str(plain), "--short-side", "48", "--out", str(tmp_path / "one.json"), "--device", "cpu"]
    assert main(["evaluate", "--weights", weights, *options]) == 0
    assert out.read_bytes() == (tmp_path / "one.json").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))
    (plain / "images" / "photo1.jpg").write_bytes(b"broken")
    code, _, error = evaluate_on_two_ranks(weights, plain, tmp_path / "bad.json")
    assert code != 0 and "photo1.jpg: not a picture" in error and not (tmp_path / "bad.json").exists()


def test_segment(weights, tmp_path, capsys):
    photo = draw_photo(tmp_path / "photos" / "a.jpg", (90, 60), seed=0)
    Image.fromarray(np.random.default_rng(0).integers(2**16, size=(40, 30), dtype=np.uint16)).save(
        tmp_path / "photos" / "deep.png"
    )
    draw_photo(tmp_path / "more" / "a.png", (33, 44), seed=1)
    out = tmp_path / "out"
    sources = [str(tmp_path / "photos"), str(tmp_path / "more" / "a.png")]
    options = [
        "--classes",
        "cat, dog,red  car",
        "--weights",
        weights,
        "--out",
        str(out),
        "--mask",
        "--short-side",
        "64",
    ]
    assert main(["segment", *sources, *options]) == 0
    names = ["a.png", "a_2.png", "a_2_mask.png", "a_mask.png", "areas.json", "deep.png", "deep_mask.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    areas = json.loads((out / "areas.json").read_text())
    assert len(areas) == 3
    mask = np.asarray(Image.open(out / "a_mask.png"))
    assert mask.shape == photo.size[::-1] and mask.max() <= 2
    shares = areas[str(tmp_path / "photos" / "a.jpg")]
    assert list(shares) == ["cat", "dog", "red car"]
    assert shares["dog"] == pytest.approx((mask == 1).mean()) and sum(shares.values()) == pytest.approx(1)
    assert "a.jpg: " in capsys.readouterr().out


def test_segment_agrees_with_the_model(weights, tmp_path):
    import mixreorg_fast

    photo = draw_photo(tmp_path / "a.png", (64, 64), seed=3)
    options = ["--classes", "cat,dog", "--weights", weights, "--out", str(tmp_path), "--mask", "--short-side", "64"]
    assert main(["segment", str(tmp_path / "a.png"), *options, "--background-threshold", "0.3"]) == 0
    model = mixreorg_fast.load(weights)
    ids, _ = model.tokenizer.encode(["a photo of a cat.", "a photo of a dog."], 24)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    labels = model.segment_labels(pixels[None], model.text_embeddings(ids), background_threshold=0.3)[0]
    assert (np.asarray(Image.open(tmp_path / "a_mask.png")) == labels.numpy()).all()


def test_segment_skips_what_is_broken_and_says_so(weights, tmp_path, capsys):
    draw_photo(tmp_path / "good.jpg", (60, 50), seed=0)
    draw_photo(tmp_path / "cut.jpg", (60, 50), seed=1)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    out = tmp_path / "out"
    code = main(["segment", str(tmp_path), "--classes", "cat", "--weights", weights, "--out", str(out)])
    error = capsys.readouterr().err
    assert code == 2 and "cut.jpg: damaged picture" in error and "1 of 2 pictures were skipped" in error
    assert (out / "good.png").is_file() and not (out / "cut.png").exists()


def test_segment_takes_huge_photos_within_memory(weights, tmp_path):
    """48 megapixels: the process, PyTorch included, stays under 1.5 GiB."""
    Image.new("RGB", (8000, 6000), "red").save(tmp_path / "huge.png", compress_level=1)
    options = ["--classes", "cat, dog", "--weights", weights, "--out", str(tmp_path / "out"), "--short-side", "64"]
    code = f"""
import resource, torch
torch.set_num_threads(1)
from mixreorg_fast.cli import main
assert main(["segment", {str(tmp_path / "huge.png")!r}, *{options!r}]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 1536, f"{done.stdout} MiB"
    assert (tmp_path / "out" / "huge.png").is_file()


@pytest.mark.parametrize(
    ("classes", "message"), [("cat,,dog", "names between commas"), ("cat, dog, cat", "'cat' is named twice")]
)
def test_segment_refuses_bad_class_lists(weights, tmp_path, capsys, classes, message):
    draw_photo(tmp_path / "a.jpg", (60, 50), seed=0)
    code = main(["segment", str(tmp_path), "--classes", classes, "--weights", weights, "--out", str(tmp_path / "o")])
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
