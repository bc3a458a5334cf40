"""Weights by name: fetched once, told apart, refused in one line; published and loaded again."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mixreorg_fast
from mixreorg_fast.cli import main
from mixreorg_fast.config import parse_config
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.images import IMAGENET_MEAN, IMAGENET_STD
from mixreorg_fast.inference.formats import read
from mixreorg_fast.inference.hub import _public, card, pinned
from mixreorg_fast.inference.model import Model
from mixreorg_fast.models import GroupViT, weights
from mixreorg_fast.training.preparation import _tokenizer
from tests.evaluation.fakes import draw_mask, draw_photo
from tests.models.huggingface import SMALL, random_images, random_model, state_equal
from tests.servers.repositories import TOKEN
from tests.tiny import fill, tiny_config

hf = pytest.importorskip("huggingface_hub")

OFFICIAL = "nvidia/groupvit-gcc-yfcc"
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder as the official ones on the hub: pytorch_model.bin, CLIP's two tokenizer files and normalisation."""
    letters = list("abcdefghijklmnopqrstuvwxyz,.")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    size = len(vocabulary)
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    model = random_model({**SMALL, "text_config": SMALL["text_config"] | ids})
    folder = tmp_path_factory.mktemp("official") / "theirs"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
    (folder / "tf_model.h5").write_bytes(b"not needed")
    return folder


@pytest.fixture
def ours(tmp_path) -> Path:
    """A run's folder with all that a model card tells."""
    tokenizer = Tokenizer.train(["a photo of a cat", "a photo of a dog", "grass"], 280)
    config = tiny_config(
        model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}},
        data={"shards": "https://me:SECRET@h/x.tar?X-Amz-Signature=SECRET,/home/me/y.tar"},
    )
    model = Model(config.model, tokenizer=tokenizer)
    fill(model)
    run = tmp_path / "runs" / "mine"
    folder = run / "checkpoints" / "step_00000004"
    model.save(folder)
    (folder / "state.json").write_text('{"step": 4}')
    (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (run / "eval.json").write_text('{"scenes": {"mIoU": 12.345, "images": 7}, "retrieval": {"r@1": 1}}')
    return run


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def fetched(hub) -> list[str]:
    """The files that were fetched so far, in order."""
    return [
        each.rsplit("/", 1)[1] for each in hub.requests if each.startswith("GET") and not each.startswith("GET /api")
    ]


def test_the_needed_files_are_fetched_once(hub, theirs, tmp_path, capsys, monkeypatch):
    repo = hub.add(OFFICIAL, theirs)
    repo.tag("v1")
    model = mixreorg_fast.load(OFFICIAL)
    needed = ["pytorch_model.bin", "vocab.json", "merges.txt", "preprocessor_config.json", "config.json"]
    assert fetched(hub) == needed
    assert (model.mean, model.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert capsys.readouterr().err.count("ImageNet's normalisation") == 1
    local = read(theirs)
    assert state_equal(dict(read(OFFICIAL).state), dict(local.state)) and local.mean == tuple(CLIP["image_mean"])
    assert model.segment(np.zeros((40, 50, 3), np.uint8), "cat, dog").labels.shape == (40, 50)
    for name in (f"{OFFICIAL}@v1", f"{OFFICIAL}@{repo.refs['main']}"):
        assert torch.equal(mixreorg_fast.load(name).logit_scale, model.logit_scale)
    assert fetched(hub) == needed

    before, capsys_drained = len(hub.requests), capsys.readouterr()
    monkeypatch.setattr(hf.constants, "HF_HUB_OFFLINE", True)
    assert mixreorg_fast.load(OFFICIAL).source == model.source
    assert len(hub.requests) == before and "cannot" not in capsys_drained.err + capsys.readouterr().err
    monkeypatch.setattr(hf.constants, "HF_HUB_OFFLINE", False)
    repo.commit(dict(repo.files, **{"README.md": b"# another commit"}))
    assert mixreorg_fast.load(OFFICIAL).source.name == repo.refs["main"] and fetched(hub) == needed, "the same contents"
    hub.fail(f"/api/models/{OFFICIAL}*", status=503, times=None)
    assert mixreorg_fast.load(OFFICIAL).source.name == repo.refs["main"]
    assert "503" in (message := capsys.readouterr().err) and "the copy in the cache is used" in message

    monkeypatch.chdir(tmp_path)
    hub.add("me/mine", theirs)
    mixreorg_fast.load(OFFICIAL).save("me/mine")
    before = len(hub.requests)
    assert mixreorg_fast.load("me/mine").source == Path("me/mine"), "a folder here comes before the hub"
    assert not [each for each in hub.requests[before:] if "me/mine" in each]


def test_training_starts_from_a_name(hub, theirs):
    hub.add("owner/start", theirs)
    tokenizer = _tokenizer(parse_config({}), "owner/start", resuming=False)
    found = read("owner/start")
    assert tokenizer.vocab_size == found.config.text.vocab_size
    network = GroupViT(found.config.model_copy(update={"image_size": 32}))
    weights.fill(network, found.state, "owner/start")
    assert torch.equal(network.logit_scale[0], found.state["logit_scale"])


def test_ranks_read_the_commit_that_the_first_one_found(hub, theirs, tmp_path):
    """Although the repository moves in between; on another node, where the commit is fetched anew, too."""
    repo = hub.add("owner/start", theirs)
    first = repo.refs["main"]
    assert pinned(theirs) == str(theirs) and pinned("owner/start") == (name := f"owner/start@{first}")
    other = torch.load(theirs / "pytorch_model.bin")
    other["logit_scale"] += 1
    torch.save(other, tmp_path / "other.bin")
    repo.commit(dict(repo.files, **{"pytorch_model.bin": (tmp_path / "other.bin").read_bytes()}))
    for _ in range(2):
        assert torch.equal(read(name).state["logit_scale"], read(theirs).state["logit_scale"])
        assert read(name).source.name == first
        shutil.rmtree(tmp_path / "home")
    assert torch.equal(read("owner/start").state["logit_scale"], other["logit_scale"])


def test_evaluation_export_and_the_page_take_a_name(hub, theirs, tmp_path, monkeypatch):
    hub.add("owner/start", theirs)
    root = tmp_path / "set"
    draw_photo(root / "images" / "one.jpg", (64, 48), seed=0)
    draw_mask(root / "masks" / "one.png", (64, 48), [0, 1, 255], seed=0)
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "splits").mkdir()
    (root / "splits" / "val.txt").write_text("one\n")
    words = ["--root", str(root), "--short-side", "48", "--device", "cpu", "--out"]
    for name, out in ((str(theirs), "local.json"), ("owner/start", "named.json")):
        assert main(["evaluate", "--model", name, *words, str(tmp_path / out)]) == 0
    local, named = (json.loads((tmp_path / out).read_text()) for out in ("local.json", "named.json"))
    assert named["settings"].pop("weights") == "owner/start" and local["settings"].pop("weights") == str(theirs)
    assert local == named

    assert main(["export", "owner/start", "--to", "torch", "--out", str(tmp_path / "programs")]) == 0
    assert list((tmp_path / "programs").glob("*.pt2"))
    pytest.importorskip("gradio")
    shown = []

    def build(model, samples):
        shown.append(model.source)
        raise UserError("that is enough")

    monkeypatch.setattr("mixreorg_fast.demo.build", build)
    assert main(["demo", "--weights", "owner/start", "--device", "cpu"]) == 2
    assert len(shown) == 1


def test_a_tokenizer_by_name(hub, theirs, tmp_path, capsys):
    """As data.tokenizer and --tokenizer take it. Of the repository only the tokenizer is fetched."""
    wanted = Tokenizer.load(theirs)
    whole = Tokenizer.load(theirs).save(tmp_path / "ours").read_bytes()
    hub.add(
        "owner/clip", {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"1", "tokenizer.json": whole}
    )
    hub.add("owner/two", theirs)
    named = [parse_config({"data": {"tokenizer": name}}) for name in ("owner/clip", "owner/two")]
    for config in named:
        assert torch.equal(
            *(each.encode(["a cat"], 9)[0] for each in (wanted, _tokenizer(config, None, resuming=False)))
        )
    assert fetched(hub) == ["tokenizer.json", "vocab.json", "merges.txt"]
    hub.fail("/api/models/*", status=503, times=None)
    for config in named:
        assert _tokenizer(config, None, resuming=False).vocab_size == wanted.vocab_size
        assert "the copy in the cache is used" in capsys.readouterr().err
    hub.faults.clear()

    hub.add("owner/none", {"README.md": b"# nothing"})
    for name, message in (
        ("owner/none", "owner/none holds no tokenizer: expected tokenizer.json"),
        ("owner/missing", "no repository owner/missing on"),
        (
            "no/tokenizer.json",
            "no tokenizer no/tokenizer.json; expected a tokenizer.json, a folder with one, or owner/",
        ),
    ):
        assert main(["convert", "owner/two", str(tmp_path / "out"), "--tokenizer", name]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["convert", "owner/two", str(tmp_path / "out"), "--tokenizer", "owner/clip"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == whole


def refusal(capsys, photo: Path, name: str) -> str:
    out = photo.parent / "out"
    assert main(["segment", str(photo), "--classes", "cat", "--weights", name, "--out", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and not out.exists(), lines
    return lines[0]


def test_what_fails_is_told_in_one_line(hub, theirs, photo, tmp_path, capsys, monkeypatch):
    hub.add("owner/good", theirs).tag("v1.0")
    hub.add("owner/gated", theirs, gated=True)
    hub.add("owner/other", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"1234"})
    hub.add("owner/empty", {"README.md": b"# nothing"})
    assert "no folder owner/none, and no repository owner/none on http" in refusal(capsys, photo, "owner/none")
    assert "no revision 'v1.1'" in (message := refusal(capsys, photo, "owner/good@v1.1")) and "'v1.0'" in message
    assert "is gated: accept its conditions on" in refusal(capsys, photo, "owner/gated")
    for name in ("owner/other", "owner/empty"):
        assert "holds no weights of a GroupViT" in refusal(capsys, photo, name)
    assert "no file or folder a/b/c; expected weights: a folder" in refusal(capsys, photo, "a/b/c")
    content = (theirs / "pytorch_model.bin").read_bytes()
    for fault, message in (
        ({"content": content[::-1]}, "pytorch_model.bin arrived damaged (its checksum is"),
        ({"truncate": 100}, "cannot be fetched from"),
        ({"cut": 100, "times": 7}, "cannot be reached"),
        ({"status": 500}, "answers 500 for owner/good"),
        ({"status": 429, "times": 7, "headers": {"Retry-After": "3"}}, "answers 429 for owner/good"),
    ):
        hub.fail("*/pytorch_model.bin", **fault)
        assert message in refusal(capsys, photo, "owner/good")
        hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "answers 401" in (message := refusal(capsys, photo, "owner/good")) and "hf auth login" in message
    monkeypatch.delenv("HF_TOKEN")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert "cannot be written (File too large)" in refusal(capsys, photo, "owner/good")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with monkeypatch.context() as context:
        context.setattr(hf.constants, "HF_HUB_OFFLINE", True)
        assert "no folder owner/good, and HF_HUB_OFFLINE is set" in refusal(capsys, photo, "owner/good")
    with monkeypatch.context() as context:
        context.setattr(hf.constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "no folder owner/good, and http://127.0.0.1:9 cannot be reached" in refusal(capsys, photo, "owner/good")
    left = [path for path in (tmp_path / "home").rglob("*") if path.name in ("config.json", "pytorch_model.bin")]
    assert left == [], "nothing half-fetched is kept"
    hub.fail("*/pytorch_model.bin", cut=1000, times=2)
    assert mixreorg_fast.load("owner/good").tokenizer is not None


def test_what_is_pushed_is_loaded_again(hub, ours, capsys, monkeypatch):
    assert main(["push", str(ours), "owner/mine"]) == 2
    assert "publishing needs an account" in capsys.readouterr().err and not hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = mixreorg_fast.load(ours)
    assert main(["push", str(ours), "owner/mine", "--private", "--license", "apache-2.0"]) == 0
    repo = hub.repos["model", "owner/mine"]
    assert repo.private and set(repo.files) == {"README.md", "model.json", "model.safetensors", "tokenizer.json"}
    assert capsys.readouterr().out.strip().endswith(repo.refs["main"])
    card = hf.ModelCard(repo.files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.eval_results[0].metric_value == 12.345
    for part in ("| scenes | 12.35 | 7 |", "4 steps", "x.tar", '"warmup_steps"', "MixReorg"):
        assert part in card.text
    assert "/home/me" not in card.text and "SECRET" not in card.text and "retrieval" not in card.text
    again = mixreorg_fast.load("owner/mine")
    assert state_equal(again.state_dict(), model.state_dict()) and again.inference == model.inference

    assert model.push_to_hub("owner/mine", "hf").startswith(hub.url)
    assert {"config.json", "model.safetensors"} < set(repo.files) and "model.json" not in repo.files
    assert "Not stated." in repo.files["README.md"].decode()
    other = mixreorg_fast.load("owner/mine")
    images = random_images(1, 32, 32)
    torch.testing.assert_close(other.image_embeddings(images), model.image_embeddings(images))
    assert torch.equal(*(each.tokenizer.encode(["a cat"], 12)[0] for each in (other, model)))
    repo.gated = True
    model.push_to_hub("owner/mine")
    assert "model.json" in repo.files and mixreorg_fast.load("owner/mine").source.name == repo.refs["main"]
    for name, message in (("other/mine", "answers 403 for other/mine"), ("mine", "not the name of a repository")):
        with pytest.raises(UserError, match=message):
            model.push_to_hub(name)
    before = repo.refs["main"]
    hub.fail("/api/models/owner/mine/commit/*", methods=("POST",), status=500)
    with pytest.raises(UserError, match="answers 500"):
        model.push_to_hub("owner/mine", "hf")
    assert repo.refs["main"] == before


def test_the_card_of_a_run_on_drawn_scenes(ours):
    about = json.loads((ours / "config.json").read_text())
    about["data"]["shards"] = [f"{about['data']['scenes']['folder']}/train-000000.tar"]  # as a run resolves them
    (ours / "config.json").write_text(json.dumps(about))
    text = str(card(mixreorg_fast.load(ours), "owner/mine", "ours", None))
    assert "The drawn scenes of mixreorg_fast; 4 steps." in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://h/x-{0..9}.tar?X-Amz-Signature=SECRET&b=SECRET", "https://h/x-{0..9}.tar"),
        ("https://me:SECRET@h/x.tar,s3://SECRET:SECRET@bucket/y.tar", "https://h/x.tar,s3://bucket/y.tar"),
        ("a.tar,/home/SECRET/b.tar", "a.tar,b.tar"),
        ("/home/{SECRET,SECRET}/x.tar, ~SECRET/y.tar", "x.tar,y.tar"),
        ("../../SECRET/x.tar", "x.tar"),
        ("hf://datasets/owner/set/x-*.tar@v1", "hf://datasets/owner/set/x-*.tar@v1"),
        ([{"shards": "https://h/x.tar?SECRET", "weight": 1.0}], [{"shards": "https://h/x.tar", "weight": 1.0}]),
        ("a photo of a {}.", "a photo of a {}."),
    ],
)
def test_a_card_holds_no_secrets(value, shown):
    assert _public({"key": value}) == {"key": shown}


@pytest.mark.slow
@pytest.mark.launch
def test_the_first_command_of_the_readme(hub, theirs, photo, tmp_path):
    """By name in a fresh home, then with the hub gone, then published and segmented with again; as processes."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    command = re.search(r"^mixreorg (segment photo\.jpg .*)$", readme, re.M)[1]
    assert f"--weights {OFFICIAL}" in command
    Image.open(photo).convert("RGB").save(tmp_path / "photo.jpg")
    hub.add(OFFICIAL, theirs)

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        values = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        values |= {**hub.environment(tmp_path / "fresh"), **environment}
        command = [sys.executable, "-m", "mixreorg_fast.cli", *words]
        return subprocess.run(command, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=300)

    words = re.sub('"', "", command.replace('"cat, sofa"', "cat,sofa")).split()
    done = run(*words)
    assert done.returncode == 0 and "photo.jpg: " in done.stdout, done.stderr[-2000:]
    first = np.array(Image.open(tmp_path / "out" / "photo.png"))
    count = len(hub.requests)
    hub.fail("*", methods=("GET", "HEAD"), cut=0, times=None)
    done = run(*words)
    assert done.returncode == 0 and "the copy in the cache is used" in done.stderr, done.stderr[-2000:]
    assert not [each for each in hub.requests[count:] if "resolve" in each]
    hub.faults.clear()
    done = run("push", OFFICIAL, "owner/copy", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run(*words[:-3], "owner/copy", "--out", "again")
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(np.array(Image.open(tmp_path / "again" / "photo.png")), first)
