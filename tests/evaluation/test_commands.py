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
from mixreorg_fast.config import InferenceConfig, ModelConfig, TextConfig
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.inference.model import Model

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
    model = Model(config, tokenizer=tokenizer)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("weights") / "w"
    model.save(folder)
    return str(folder)


def test_evaluate(weights, plain, tmp_path, capsys):
    out, figure = tmp_path / "out" / "eval.json", tmp_path / "out" / "seg.png"
    options = ["--dataset", "plain", "--root", str(plain), "--short-side", "48", "--templates", "imagenet7"]
    code = main(["evaluate", "--weights", weights, *options, "--out", str(out), "--pictures", str(figure)])
    assert code == 0
    result = json.loads(out.read_text())
    assert set(result) == {
        "mIoU", "per_class", "per_class_images", "pixel_accuracy", "mean_accuracy", "boundary_mIoU",
        "all_background_mIoU", "oracle_mIoU", "whole_photo_mIoU", "groups_used", "images", "settings",
    }  # fmt: skip
    assert list(result["per_class"]) == ["background", "cat", "dog", "red car"]
    assert result["images"] == 7 and 0 <= result["mIoU"] <= 100
    assert result["settings"]["short_side"] == 48 and len(result["settings"]["templates"]) == 7
    printed = capsys.readouterr().out
    assert f"mIoU {result['mIoU']:.2f} % over 7 photos" in printed and "red car" in printed
    assert Image.open(figure).width > 500


def test_huggingfaces_groupvit_scores_as_ours(weights, plain, tmp_path):
    assert main(["convert", weights, str(tmp_path / "hf"), "--to", "hf"]) == 0
    scores = []
    for model in (weights, str(tmp_path / "hf")):
        options = ["--root", str(plain), "--short-side", "48", "--device", "cpu", "--out", str(tmp_path / "eval.json")]
        assert main(["evaluate", "--model", model, *options]) == 0
        scores.append(json.loads((tmp_path / "eval.json").read_text()))
        assert scores[-1].pop("settings")["weights"] == model
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "voc"], "unknown dataset layout 'voc'"),
        (["--split", "vla"], "did you mean 'val'"),
        (["--resume"], "--resume needs --out FILE"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--templates", "imagenet"], "did you mean 'imagenet7'"),
        (["--device", "nowhere"], "--device nowhere: not available"),
        (["--mode", "sliding", "--window", "100", "--stride", "50"], "not a multiple of the patch 8"),
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


@pytest.mark.launch
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

    photo = draw_photo(tmp_path / "photo" / "a.png", (64, 64), seed=3)
    options = ["--classes", "cat,dog", "--weights", weights, "--out", str(tmp_path), "--mask", "--short-side", "64"]
    assert main(["segment", str(tmp_path / "photo" / "a.png"), *options, "--background-threshold", "0.3"]) == 0
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


@pytest.mark.launch
def test_segment_takes_huge_photos_within_memory(weights, tmp_path):
    """48 megapixels: the process, PyTorch included, stays under 1.5 GiB."""
    Image.new("RGB", (8000, 6000), "red").save(tmp_path / "huge.png", compress_level=1)
    options = ["--classes", "cat, dog", "--weights", weights, "--out", str(tmp_path / "out"), "--short-side", "64"]
    code = f"""
import re, torch
torch.set_num_threads(1)
from mixreorg_fast.cli import main
assert main(["segment", {str(tmp_path / "huge.png")!r}, *{options!r}]) == 0
# Not ru_maxrss, which counts the process that started this one as well.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 1536, f"{done.stdout} MiB"
    assert (tmp_path / "out" / "huge.png").is_file()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("cat,,dog", "names separated by commas"),
        ("cat, dog, cat", "'cat' is named twice"),
        ("cat, Cat", "'Cat' is named twice (also as 'cat')"),
    ],
)
def test_segment_refuses_bad_class_lists(weights, tmp_path, capsys, classes, message):
    draw_photo(tmp_path / "a.jpg", (60, 50), seed=0)
    code = main(["segment", str(tmp_path), "--classes", classes, "--weights", weights, "--out", str(tmp_path / "o")])
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def segment(weights: str, out: Path, *arguments: str, classes: tuple[str, ...] = ("--classes", "cat, dog")) -> int:
    return main(["segment", *arguments, *classes, "--weights", weights, "--out", str(out), "--short-side", "32"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_segment_writes_over_no_photo(weights, tmp_path, capsys):
    """Beside the photos, twice: photos stay, overlays are replaced and not segmented themselves."""
    for number, name in enumerate(("grey.png", "grey_mask.png", "grey.jpg", "other.jpg")):
        draw_photo(tmp_path / name, (40, 30), seed=number)
    before = contents(tmp_path)
    made = {
        *("grey_segmented.png", "grey_segmented_mask.png", "grey_segmented_2.png", "grey_segmented_2_mask.png"),
        *("grey_mask_segmented.png", "grey_mask_segmented_mask.png", "other.png", "other_mask.png", "areas.json"),
    }
    for _ in range(2):
        assert segment(weights, tmp_path, str(tmp_path), "--mask") == 0
        after = contents(tmp_path)
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == made
        assert len(json.loads(after["areas.json"])) == len(before)
    assert f"({tmp_path / 'grey_segmented.png'})" in capsys.readouterr().out
    # An overlay that is named itself is a photo like others.
    assert segment(weights, tmp_path, str(tmp_path / "other.png"), str(tmp_path / "other.jpg")) == 0
    again = contents(tmp_path)
    assert again["other.png"] == after["other.png"]
    assert set(again) - set(after) == {"other_2.png", "other_3.png"}


def test_segment_writes_over_nothing_of_others(weights, tmp_path):
    photo, out = tmp_path / "a.jpg", tmp_path / "out"
    draw_photo(photo, (40, 30), seed=0)
    draw_photo(out / "a.png", (40, 30), seed=1)
    (tmp_path / "linked.jpg").symlink_to(photo)
    (out / "linked.png").symlink_to(photo)
    before = contents(tmp_path)
    assert segment(weights, out, str(photo), str(tmp_path / "linked.jpg")) == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"out/a_segmented.png", "out/linked_segmented.png", "out/areas.json"}


def test_a_second_run_adds_to_the_first(weights, tmp_path):
    """Photos of the same name from two folders: both overlays and both entries stay."""
    for number, folder in enumerate(("one", "two")):
        draw_photo(tmp_path / folder / "a.jpg", (40, 30), seed=number)
        assert segment(weights, tmp_path / "out", str(tmp_path / folder)) == 0
    photos = [str(tmp_path / folder / "a.jpg") for folder in ("one", "two")]
    assert sorted(contents(tmp_path / "out")) == ["a.png", "a_2.png", "areas.json"]
    assert list(json.loads((tmp_path / "out" / "areas.json").read_text())) == photos
    # A photo once more: its own entry and overlay are replaced.
    other = ("--classes", "bird, sky")
    assert segment(weights, tmp_path / "out", photos[0], classes=other) == 0
    assert sorted(contents(tmp_path / "out")) == ["a.png", "a_2.png", "areas.json"]
    areas = json.loads((tmp_path / "out" / "areas.json").read_text())
    assert list(areas[photos[0]]) == ["bird", "sky"] and list(areas[photos[1]]) == ["cat", "dog"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a.jpg": 1}', "\xff"])
def test_damaged_areas_are_not_written_over(weights, tmp_path, capsys, content):
    photo, out = tmp_path / "a.jpg", tmp_path / "out"
    draw_photo(photo, (40, 30), seed=0)
    out.mkdir()
    (out / "areas.json").write_bytes(content.encode("latin-1"))
    assert segment(weights, out, str(photo)) == 2
    error = capsys.readouterr().err
    assert "areas.json: " in error and "move it away, or name another --out" in error and error.count("\n") == 1
    assert contents(out) == {"areas.json": content.encode("latin-1")}


def test_an_output_folder_that_is_a_file(weights, tmp_path, capsys):
    draw_photo(tmp_path / "a.jpg", (40, 30), seed=0)
    assert segment(weights, tmp_path / "a.jpg", str(tmp_path / "a.jpg")) == 2
    assert "a.jpg: a file; a folder was expected" in capsys.readouterr().err


def test_segment_takes_names_from_a_file_and_photos_from_subfolders(weights, tmp_path, capsys):
    for number, name in enumerate(("a.jpg", "in/a.jpg", "in/deeper/b.jpg", ".hidden/c.jpg")):
        draw_photo(tmp_path / "photos" / name, (40, 30), seed=number)
    (tmp_path / "photos" / "in" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "names.txt").write_text("# pets\ncat\n\nred  car\n")
    options = (str(tmp_path / "photos"), "--recursive")
    for _ in range(2):  # the output folder lies within the photos'
        out = tmp_path / "photos" / "in" / "out"
        assert segment(weights, out, *options, classes=("--classes-file", str(tmp_path / "names.txt"))) == 0
        assert sorted(contents(out)) == ["a.png", "areas.json", "in/a.png", "in/deeper/b.png"]
    assert {tuple(shares) for shares in json.loads((out / "areas.json").read_text()).values()} == {("cat", "red car")}
    assert segment(weights, tmp_path / "flat", str(tmp_path / "photos")) == 0
    assert sorted(contents(tmp_path / "flat")) == ["a.png", "areas.json"]
    capsys.readouterr()
    assert segment(weights, tmp_path / "o", *options, "--classes-file", str(tmp_path / "names.txt")) == 2
    assert "not allowed with argument --classes" in capsys.readouterr().err
    assert segment(weights, tmp_path / "o", *options, classes=()) == 2
    assert "one of the arguments --classes --classes-file is required" in capsys.readouterr().err


def test_weights_carry_their_settings(weights, plain, tmp_path, capsys):
    """Command, Python and evaluation take the same from model.json; an option overrules it in each."""
    import mixreorg_fast
    from mixreorg_fast.evaluation.datasets import open_dataset
    from mixreorg_fast.evaluation.zero_shot import evaluate, segmenter_for

    model = mixreorg_fast.load(weights)
    model.inference = InferenceConfig(
        short_side=40, mode="sliding", window=32, stride=16, background_threshold=0.6, templates="a {}."
    )
    model.save(tmp_path / "carrying")
    again = mixreorg_fast.load(tmp_path / "carrying")
    assert again.inference == model.inference

    carrying, photo = str(tmp_path / "carrying"), tmp_path / "photos" / "a.png"
    draw_photo(photo, (90, 60), seed=0)
    options = [str(photo), "--classes", "cat, dog", "--weights", carrying, "--mask"]

    def mask(*more: str) -> np.ndarray:
        assert main(["segment", *options, "--out", str(tmp_path / "out"), *more]) == 0
        return np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))

    found = model.segment(photo, "cat, dog")
    assert found.classes == ["background", "cat", "dog"] and (mask() == found.labels.numpy()).all()
    explicit = {"short_side": 64, "mode": "whole", "background_threshold": 0, "templates": "imagenet7"}
    found = model.segment(photo, ["cat", "dog"], **explicit)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in explicit.items()]
    assert found.classes == ["cat", "dog"] and (mask(*given) == found.labels.numpy()).all()

    dataset = open_dataset("plain", plain)
    assert main(["evaluate", "--weights", carrying, "--root", str(plain), "--out", str(tmp_path / "a.json")]) == 0
    scores = json.loads((tmp_path / "a.json").read_text())
    assert scores["settings"] | model.inference.model_dump(mode="json") == scores["settings"]
    assert scores["mIoU"] == evaluate(segmenter_for(model, dataset), dataset, progress=False)["mIoU"]
    capsys.readouterr()
    assert main(["segment", *options, "--out", str(tmp_path / "out"), "--classes", "Background, cat"]) == 2
    assert "'background' is what scores below the background threshold (0.6)" in capsys.readouterr().err
