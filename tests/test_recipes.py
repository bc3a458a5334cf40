"""docs/recipes.md: its configurations, which need no preparation, its table, and the hours in it, from the parts that
the results file holds."""

import json
import re

import pytest

from benchmarks import counted, recipes
from mixreorg_fast.config import load_config, parse_config
from mixreorg_fast.config.files import merged
from mixreorg_fast.data.remote.command import KNOWN
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.evaluation.layouts import LAYOUTS
from mixreorg_fast.ledger import between_markers
from mixreorg_fast.training.preparation import check_inputs


def test_each_recipe_fits_one_gpu_and_eight():
    for recipe in recipes.PAIRS:
        one, eight = (load_config(recipes.CONFIGS / f"{recipe}{suffix}.json") for suffix in ("_1gpu", ""))
        assert (one.name, eight.name) == (f"{recipe}_1gpu", recipe)
        assert one.train.grad_cache and one.micro_batch(1) == 1024 and eight.micro_batch(8) == 512
        patterns = [KNOWN[part].pattern for part in recipe.split("_")]
        assert one.data == eight.data and one.data.shards in (patterns, patterns[0])


def test_no_recipe_needs_a_file_of_this_machine(hub, tmp_path):
    Tokenizer.train(["a cat and a dog"] * 3, 300).save(tmp_path / "clip")
    hub.add("openai/clip-vit-base-patch32", tmp_path / "clip")
    for name in ("cc3m", "cc12m"):
        shards = [f"{name}-train-0000.tar", f"{name}-validation-0000.tar"]
        hub.add(f"pixparse/{name}-wds", dict.fromkeys(shards, b"fetched in training"), kind="dataset")
    for recipe in recipes.PAIRS:
        for suffix in ("", "_1gpu"):
            overrides = [f"data.cache.folder={tmp_path / 'remote'}"]
            check_inputs(load_config(recipes.CONFIGS / f"{recipe}{suffix}.json", overrides), resuming=False)


def test_evaluation_sets_of_the_page():
    page = recipes.PAGE.read_text()
    named = " ".join(re.findall(r"^\| (`.+?) \| `data", page, re.MULTILINE))
    assert set(re.findall(r"\w+", named)) == set(LAYOUTS)
    (scored,) = re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    values = json.loads(scored)
    base = load_config(recipes.CONFIGS.parent / values.pop("extends"))
    config = parse_config(merged(base.model_dump(mode="json"), values))
    assert {entry.dataset for entry in config.eval.datasets} < {*LAYOUTS}


def test_the_page_has_the_hours_of_the_results_file():
    page = recipes.PAGE.read_text()
    assert page == between_markers(page, recipes.table()), "python -m benchmarks.recipes --table"
    for row in json.loads(recipes.RESULTS.read_text())["rows"]:
        flop = (row["step_gflop"] + row["forward_again"] * row["forward_gflop"]) * 1e9
        seconds = flop / recipes.MATMUL_FLOP_PER_S
        seconds += (recipes.PASSES + row["forward_again"]) * row["kept_mb"] * 1e6 / counted.BYTES_PER_S
        hours = row["pairs"] * row["epochs"] * seconds / row["gpus"] / 3600
        assert row["predicted_hours"] == pytest.approx(hours, rel=1e-3)
        assert row["kept_mb"] == pytest.approx(recipes.kept_bytes() * 1e-6, rel=1e-3)
