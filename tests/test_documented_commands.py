"""Every fenced command of README and docs/: run in order in a clean folder, or as far as COMMANDS says and why.

The folder holds what the pages speak of, all of it small: photos, captions, datasets, weights. Training runs take
TINY besides what is documented.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixreorg_fast.cli import command as command_of
from mixreorg_fast.cli import main
from mixreorg_fast.config import find_config, load_config
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.inference.model import Model
from tests.evaluation.fakes import draw_mask, draw_photo
from tests.tiny import fill, tiny_config

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/first_steps.md", "docs/data.md", "docs/weights.md"]  # later ones use what these make
TINY = (
    *("train.steps=2", "train.batch=8", "train.warmup_steps=1", "data.scenes.train=16", "data.scenes.val=4"),
    *("eval.every=0", "data.threads=1"),
)
PROGRAMS = "mixreorg|python|deepspeed|torchrun|pip|make|bash|pytest|ln|mkdir"

RUN, TRAIN, PARSE, SHELL = "run", "train", "parse", "shell"
# The first expression that matches the beginning of a command says how far it is run here, and why not further: RUN it
# in this process; TRAIN it with TINY; PARSE its arguments alone; hand it to a SHELL.
COMMANDS: list[tuple[str, str, str]] = [
    (r"make train\b", TRAIN, ""),
    (r"make ", PARSE, "sets up an environment from a package index; tests/test_makefile.py"),
    (r"pip ", PARSE, "installs from a package index"),
    (r"mixreorg train own( |$)", PARSE, "tests/test_own_data.py trains it"),
    (r"mixreorg train cc", PARSE, "needs GPUs and sets on the hub"),
    (r"docker ", PARSE, "needs its daemon; tests/test_docker.py"),
    (r"(mkdir -p \S+ && )?(curl|csDownload) ", PARSE, "a download"),
    (r"(unzip|python prepare_|python -c) ?", PARSE, "reads a download"),
    (r"python examples/pascal_context", PARSE, "reads a download; tests/test_examples.py"),
    (r"mixreorg train --config scored", PARSE, "tests/test_recipes.py reads that file"),
    (r"(deepspeed|torchrun|python) .*configs/cc12m\w*\.json", PARSE, "needs GPUs and CC12M"),
    (r"deepspeed .*configs/own\.json", PARSE, "tests/test_own_data.py trains it"),
    (r"(deepspeed|python) .*configs/zero2\.json", PARSE, "`make train` on other devices"),
    (r"mixreorg study ", PARSE, "trains for half an hour and more; tests/study"),
    (r"mixreorg demo\b", PARSE, "serves until it is ended; tests/test_demo.py"),
    (r"mixreorg (info|config)\b", RUN, ""),
    (r"mixreorg shards (build|scenes|verify)\b", RUN, ""),
    (r"mixreorg convert SOURCE TARGET \[", PARSE, "a synopsis"),
    (r"mixreorg push DIR owner/name \[", PARSE, "a synopsis"),
    (r"mixreorg convert group_vit_gcc_yfcc_30e\.pth", PARSE, "a download of 200 MB; tests/models/test_pth.py"),
    (r"mixreorg convert", RUN, ""),
    (r"mixreorg export", PARSE, "compiles for half a minute; tests/models/test_export.py"),
    (r"mixreorg evaluate .*--dataset (context|coco_object|ade20k)", PARSE, "these sets have tests/evaluation"),
    (r"mixreorg evaluate --model baseline:", PARSE, "tests/test_docs.py runs the page's functions"),
    (r"mixreorg evaluate .*--mode sliding", PARSE, "slow; tests/evaluation"),
    (r"mixreorg (evaluate|segment)", RUN, ""),
    (r"pytest benchmarks/", PARSE, "measures for an hour"),
    (r"python -m benchmarks\.", PARSE, "writes docs/, or measures"),
    (r"(ln -s|mkdir -p) ", SHELL, ""),
]
# Python of pages that another test runs, or why it is not run.
PYTHON = {
    "docs/evaluate.md": "tests/test_docs.py",
    "docs/weights.md": "tests/test_docs.py",
}


def commands_of(page: str) -> Iterator[str]:
    """The commands in a page's fenced blocks, without comments; output and data have blocks of their own."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            line = " ".join(re.sub(r"\s#.*", "", line).split())
            if line and (language == "sh" or (not language and re.match(rf"({PROGRAMS})\b", line))):
                yield line


def every_command() -> list[tuple[str, str]]:
    pages = [*PAGES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
    found = [
        (page, command) for page in dict.fromkeys(pages) if (ROOT / page).is_file() for command in commands_of(page)
    ]
    return list({command: (page, command) for page, command in reversed(found)}.values())[::-1]


def plan(command: str) -> tuple[str, str]:
    """How far a command is run, and why not further."""
    bare = re.sub(r"^([A-Z0-9_]+=\S* )+", "", command).removeprefix(".venv/bin/")
    for pattern, how, why in COMMANDS:
        if re.match(pattern, bare):
            return how, why
    raise LookupError(bare)


@pytest.mark.parametrize(("page", "command"), every_command())
def test_every_command_is_classified_and_its_arguments_exist(page, command):
    """A new command fails here: add it to COMMANDS."""
    try:
        how, why = plan(command)
    except LookupError as unknown:
        pytest.fail(f"{page}: `{unknown}`: say in COMMANDS of {Path(__file__).name} whether it is run, and why not")
    assert how != PARSE or why
    if how == PARSE and why != "a synopsis":
        parse(command)


def parse(command: str) -> None:
    """See that a command's options, files, targets and extras exist."""
    words = shlex.split(re.sub(r"^([A-Z0-9_]+=\S* )+", "", command))
    if words[0] == "mixreorg":
        _, parser = command_of(words[1])
        options = parser.parse_args(words[2:])
        if words[1] in ("study", "train") and words[2] != "--config":
            assert find_config(str(ROOT / words[2] if words[1] == "study" else words[2])).is_file()
        assert options is not None
    elif "train.py" in words:
        place = words.index("train.py")
        _, parser = command_of("train")
        options = parser.parse_args(words[place + 1 :])
        load_config(ROOT / options.config, options.set)
        launcher = words[1:place]
        if words[0] == "deepspeed":
            runner = pytest.importorskip("deepspeed.launcher.runner")
            assert runner.parse_args([*launcher, "train.py"]).user_script == "train.py"
        elif words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            assert get_args_parser().parse_args([*launcher, "train.py"]).training_script == "train.py"
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        for place, word in enumerate(words):
            assert word != "-c" or (ROOT / words[place + 1]).is_file()
            if word.startswith("."):
                extras = re.findall(r"[\w-]+", word)
                assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), word
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "docker":
        if "mixreorg" in words:
            parse(shlex.join(words[words.index("mixreorg") :]))
    elif words[:2] == ["python", "-c"]:
        ast.parse(words[2])
    elif words[0] == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file()
    elif "csDownload" in words or words[0] in ("unzip", "python"):
        assert plan(command)[1].startswith(("a download", "reads a download"))
    elif "curl" in words:
        assert any(re.match("https?://", word) for word in words)
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))
    else:
        pytest.fail(f"{command}: nothing here knows how to read its arguments")


def test_every_python_block_is_run_somewhere():
    for path in (ROOT / "docs").glob("*.md"):
        if "```python" in path.read_text():
            page = str(path.relative_to(ROOT))
            assert page in PYTHON or page in PAGES, f"{page}: say in PYTHON which test runs its lines"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder like a checkout's, with its configurations and the data that the pages speak of."""
    folder = tmp_path_factory.mktemp("documented") / "checkout"
    folder.mkdir()
    for name in ("configs", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    tokenizer = Tokenizer.train(["a photo of a cat and a dog", "a red car on the road"] * 3, 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model
    model = Model(config, tokenizer=tokenizer)
    fill(model)
    model.save(folder / "DIR")
    if importlib.util.find_spec("transformers"):
        assert main(["convert", str(folder / "DIR"), str(folder / "groupvit-gcc-yfcc"), "--to", "hf"]) == 0
        (folder / "SOURCE").symlink_to("groupvit-gcc-yfcc")
    else:
        (folder / "SOURCE").symlink_to("DIR")
    for number, name in enumerate(("photo.jpg", "folder/a.jpg", "folder/b.jpg")):
        draw_photo(folder / name, (64, 48), seed=number)
    (folder / "names.txt").write_text("cat\ndog\n")
    for number in range(8):
        draw_photo(folder / f"FOLDER/{number}.jpg", (64, 48), seed=number)
        (folder / f"FOLDER/{number}.txt").write_text("a cat and a dog\n")

    flickr = folder / "FLICKR8K"
    for number in range(4):
        draw_photo(flickr / f"images/{number}.jpg", (64, 48), seed=number)
    (flickr / "captions.tsv").write_text("".join(f"{number}.jpg\ta dog\n" for number in range(4)))
    (flickr / "splits").mkdir()
    (flickr / "splits/train.txt").write_text("0\n1\n2\n")
    (flickr / "splits/val.txt").write_text("3\n")
    for name in ("VOC2012", "CAMVID"):
        draw_photo(folder / name / "images/a.jpg", (64, 48), seed=0)
        draw_mask(folder / name / "masks/a.png", (64, 48), [0, 1, 255], seed=0)
        (folder / name / "classes.txt").write_text("road\ncar\n")
        (folder / name / "splits").mkdir()
        (folder / name / "splits/val.txt").write_text("a\n")
    voc = folder / "VOCdevkit" / "VOC2012"
    draw_photo(voc / "JPEGImages/a.jpg", (64, 48), seed=0)
    draw_mask(voc / "SegmentationClass/a.png", (64, 48), [0, 1, 255], seed=0)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("a\n")
    return folder


def train(command: str, folder: Path) -> None:
    """The command, or the recipe of a make target, with TINY."""
    if command == "make train":
        recipe = re.search(r"^train: env\n\t\$\(RUN\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        command = recipe.group(1)
    words = shlex.split(command)
    assert words[:2] == ["mixreorg", "train"], command
    overrides = [word for each in TINY for word in ("--set", each)]
    done = subprocess.run(
        [sys.executable, "-m", "mixreorg_fast.cli", *words[1:], *overrides],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.launch
def test_commands_run_in_order(place, hub, monkeypatch, capsys):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(place)
    hub.add("nvidia/groupvit-gcc-yfcc", place / "DIR")
    for page, command in every_command():
        how, _ = plan(command)
        if how == SHELL:
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}: {command}: {done.stderr}"
        elif how == TRAIN:
            train(command, place)
        elif how == RUN:
            assert main(shlex.split(command.removeprefix(".venv/bin/"))[1:]) == 0, (
                f"{page}: {command}: {capsys.readouterr()}"
            )


def test_python_of_the_readme(place, hub, monkeypatch):
    """The second block's ops on a CPU, with tensors of the shapes that its comments give."""
    import torch

    monkeypatch.chdir(place)
    first, second = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict = {}
    hub.add("nvidia/groupvit-gcc-yfcc", place / "DIR")
    exec(first, names)
    assert names["labels"].shape == (48, 64)
    x, q, k = torch.randn(64, 196, 32), torch.randn(64, 8, 32), torch.randn(64, 196, 32)
    names = {"x": x, "q": q, "k": k, "v": k}
    *lines, last = second.replace('"cuda"', '"cpu"').splitlines()
    exec("\n".join(lines), names)
    assert names["mixed"].shape == x.shape and names["segments"].shape == q.shape
    called = ast.parse(last).body[0].value.func.id  # tests/models/test_accelerate.py calls it
    assert callable(names[called])
