"""The Python of docs/ runs as written, page by page, where `weights/` and photos lie."""

import re
import shutil
from pathlib import Path

import pytest

from mixreorg_fast.cli import main
from mixreorg_fast.convert import save_huggingface
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.inference.model import Model
from tests import markdown
from tests.evaluation.fakes import draw_mask, draw_photo
from tests.tiny import fill, tiny_config

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with `weights/`, photos and a small dataset."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train(["a photo of a cat and a dog", "a red car on the road"] * 3, 300)
    model = Model(
        tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model, tokenizer=tokenizer
    )
    fill(model)
    model.save(tmp_path / "weights")
    for number, name in enumerate(("photo.jpg", "other.jpg", "data/camvid/images/a.jpg")):
        draw_photo(tmp_path / name, (64, 48), seed=number)
    draw_mask(tmp_path / "data/camvid/masks/a.png", (64, 48), [0, 1, 255], seed=0)
    (tmp_path / "data/camvid/classes.txt").write_text("road\ncar\nsky\nbuilding\n")
    (tmp_path / "data/camvid/splits").mkdir()
    (tmp_path / "data/camvid/splits/val.txt").write_text("a\n")
    return tmp_path


def python_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def test_evaluate(place):
    blocks, names = python_of("evaluate.md"), {}
    assert len(blocks) == 4
    exec(blocks[0], names)
    assert 0 <= names["scores"]["mIoU"] <= 100
    Path("baseline.py").write_text(blocks[1])
    shutil.copytree("data/camvid", "scenes/val")
    Path("scenes/val/classes.txt").write_text("background\ncircle\n")
    exec(blocks[2], names)
    assert names["scores"]["settings"]["model"] == "baseline:contrast" and names["scores"]["per_class"]["circle"] > 0
    exec(blocks[1], names)
    assert names["centre"](names["np"].zeros((9, 9)), ["background", "cat", "circle"])[1].max() > 0.9
    exec(blocks[3], names)
    assert (place / "overlay.png").is_file() and (place / "mask.png").is_file()
    assert list(names["result"].areas) == list(names["result"].scores) == ["cat", "dog", "sofa"]


def test_weights(place):
    blocks, names = python_of("weights.md"), {}
    assert len(blocks) == 4
    blocks = [block for block in blocks if "onnxruntime" not in block]  # tests/models/test_export.py runs it
    exec(blocks[0], names)
    assert (place / "overlay.png").is_file()
    pytest.importorskip("transformers")
    assert main(["convert", "weights", "my-groupvit", "--to", "hf"]) == 0
    for block in blocks[1:]:
        exec(block, names)
    assert names["labels"].shape[0] == 1


def headings_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_the_pages_leads_somewhere():
    for page in (*DOCS.parent.glob("*.md"), *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            place = (page.parent / name).resolve() if name else page
            assert place.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings_of(place), f"{page.name}: {target}"


def test_the_conclusion_of_the_results_page_stands_in_its_tables():
    opening, _, tables = (DOCS / "results.md").read_text().partition("## Tables")
    for row in markdown.rows(opening):
        for heading, cell in row.items():
            assert "±" not in cell or f" {cell} |" in tables, f"{heading}: {cell} is in no table"


def test_the_default_run_cannot_be_exported_and_the_page_says_so(place):
    config = tiny_config(model={"hard_assignment": False}).model
    with pytest.raises(UserError, match="softly .*model.hard_assignment=true can be exported"):
        save_huggingface(Model(config), place / "out", {})
    page = (DOCS / "weights.md").read_text()
    assert "runs/zero2" not in page
    assert re.search(r"refused for weights that assign patches softly, such as .*`runs/scenes`", page)
