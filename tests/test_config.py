"""Every mistake in a configuration ends in one line that names the key and the nearest valid choice."""

import json
from pathlib import Path

import pytest

from mixreorg_fast.config import Config, load_config, parse_config
from mixreorg_fast.config.keys import tables
from mixreorg_fast.config.section import keys
from mixreorg_fast.errors import UserError
from mixreorg_fast.ledger import between_markers

CONFIGS = Path(__file__).parents[1] / "configs"


def problem(values, world_size=None) -> str:
    with pytest.raises(UserError) as caught:
        config = parse_config(values)
        if world_size:
            config.micro_batch(world_size)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_the_paper_scale():
    config = parse_config({})
    assert config.model.patches == 196
    assert (config.model.depths, config.model.groups) == ((6, 3, 3), (64, 8))
    assert (config.train.batch, config.train.epochs, config.train.warmup_epochs) == (4096, 30, 2)
    assert config.train.precision == "auto"


RUNS = [path for path in sorted(CONFIGS.glob("*.json")) if "study" not in path.stem]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_configurations(path):
    config = load_config(path)
    assert config.micro_batch(world_size=1) > 0 and config.micro_batch(world_size=2) > 0
    assert config.name != Config().name, "each run kind has a run folder of its own"
    if path.stem == "cc12m":  # paper scale, on any usual number of GPUs, one of them too
        assert (config.train.batch, config.train.epochs, config.train.warmup_epochs) == (4096, 30, 2)
        assert [config.micro_batch(size) for size in (1, 8, 64, 512)] == [4096, 512, 64, 8]
        parts = load_config(path, ["train.accumulation=16", "train.grad_cache=true"])
        assert parts.train.grad_cache and parts.micro_batch(1) == 256


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"trian": {}}, ["'trian'", "did you mean 'train'"]),
        ({"train": {"stesp": 1}}, ["'train.stesp'", "did you mean 'steps'"]),
        ({"model": {"text": {"widht": 1}}}, ["'model.text.widht'", "did you mean 'width'"]),
        ({"eval": {"datasets": [{"name": "a", "root": "b", "splitt": "x"}]}}, ["splitt", "did you mean 'split'"]),
        ({"eval": {"datasets": [{"name": "a"}]}}, ["eval.datasets.0.root is missing"]),
        ({"train": {"steps": "10"}}, ["train.steps", "integer", '"10"']),
        ({"train": {"batch": 0}}, ["train.batch", "greater than 0", "got 0"]),
        ({"model": {"method": "mixreorgg"}}, ["model.method", "did you mean 'mixreorg'"]),
        ({"model": {"image_size": 225}}, ["225", "patch_size 16", "224 or 240"]),
        ({"model": {"heads": 5}}, ["width 384", "heads 5", "4 heads"]),
        ({"mixing": {"context_blocks": 6}}, ["context_blocks 6", "nearest: 5"]),
        ({"mixing": {"group_size": 1}}, ["mixing.group_size", "2"]),
        ({"mixing": {"blend": 1.5}}, ["mixing.blend", "1"]),
        ({"data": {"augment": {"crop_scale": [0.9, 0.5]}}}, ["crop_scale", "rising"]),
        ({"eval": {"templates": ["a photo"]}}, ["'a photo'", "{}"]),
        ({"deepspeed": {"zero_stage": 4}}, ["zero_stage", "3"]),
        ({"deepspeed": {"options": {"optimizer": {}}}}, ["options.optimizer", "train.lr"]),
        ({"deepspeed": {"offload_parameters": True}}, ["offload_parameters", "zero_stage 3"]),
        ({"train": {"cuda_graphs": True, "compile": False}}, ["cuda_graphs", "compile"]),
        (
            {"train": {"batch": 8, "accumulation": 2}, "mixing": {"group_size": 2, "context_share": 0.25}},
            ["context_share 0.25 of 2 mixing groups leaves none", "nearest: 0.5"],
        ),
        ({"train": {"tf32": True}}, ["tf32 needs precision fp32, got auto"]),
        ({"train": {"cuda_graphs": True, "checkpoint_activations": True}}, ["cuda_graphs", "checkpoint_activations"]),
        ({"train": {"cuda_graphs": True}, "deepspeed": {"zero_stage": 3}}, ["cuda_graphs", "zero_stage 0, 1 or 2"]),
    ],
)
def test_mistakes(values, parts):
    text = problem(values)
    for part in parts:
        assert part in text, text


def test_batch_must_split_over_ranks_micro_steps_and_mixing_groups():
    assert parse_config({"train": {"batch": 64, "accumulation": 2}}).micro_batch(4) == 8
    text = problem({"train": {"batch": 30}}, world_size=1)
    assert "train.batch 30" in text and "nearest: 28 or 32" in text
    text = problem({"train": {"batch": 64, "accumulation": 3}}, world_size=2)
    assert "2 ranks" in text and "nearest: 48 or 72" in text
    # The baseline does not mix, so no group has to divide its batch.
    assert parse_config({"train": {"batch": 30}, "model": {"method": "groupvit"}}).micro_batch(1) == 30


def test_overrides(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"train": {"steps": 5}}))
    config = load_config(path, ["train.steps=7", "name=other", "data.shards=x-{0..3}.tar", "model.groups=[8, 4]"])
    assert (config.train.steps, config.name, config.data.shards) == (7, "other", "x-{0..3}.tar")
    assert config.model.groups == (8, 4)
    for override, part in (("train.steps", "KEY=VALUE"), ("train.stesp=1", "steps"), ("name.x=1", "no section")):
        with pytest.raises(UserError, match=part):
            load_config(path, ["name=a", override])


def test_files(tmp_path):
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(UserError, match="did you mean.*zero2.json"):
        load_config(tmp_path / "zero3.json")
    bad = tmp_path / "bad.json"
    bad.write_text('{"train": {\n"steps": }}')
    with pytest.raises(UserError, match="line 2: not JSON"):
        load_config(bad)
    bad.write_text("[1]")
    with pytest.raises(UserError, match="JSON object"):
        load_config(bad)


def test_a_file_extends_another(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"train": {"steps": 5, "lr": 0.1}, "name": "base"}))
    child = tmp_path / "child.json"
    child.write_text(json.dumps({"extends": "base.json", "train": {"lr": 0.2}, "name": "child"}))
    config = load_config(child)
    assert (config.name, config.train.steps, config.train.lr) == ("child", 5, 0.2)
    (tmp_path / "base.json").write_text(json.dumps({"extends": "child.json"}))
    with pytest.raises(UserError, match="leads back to itself"):
        load_config(child)
    child.write_text(json.dumps({"extends": "bas.json"}))
    with pytest.raises(UserError, match="did you mean.*base.json"):
        load_config(child)


def test_resolved_configuration_reads_back(tmp_path):
    config = parse_config({"train": {"steps": 5}, "eval": {"datasets": [{"name": "a", "root": "b"}]}})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(path) == config
    assert isinstance(config, Config)


def test_every_key_is_listed_with_its_meaning(capsys):
    from mixreorg_fast.cli import main

    listed = {key.name: key for key in keys(Config)}

    def leaves(values: dict, prefix: str = "") -> set[str]:
        inner = {key: value for key, value in values.items() if isinstance(value, dict) and value}
        names = {prefix + key for key in values.keys() - inner.keys()}
        return names.union(*(leaves(value, f"{prefix}{key}.") for key, value in inner.items()))

    assert leaves(parse_config({}).model_dump(mode="json")) == {name for name in listed if "[]" not in name}
    assert all(key.meaning and key.type for key in listed.values()), [k for k in listed.values() if not k.meaning]
    assert listed["train.lr"].default == "0.0016" and listed["train.steps"].type == "integer | null"
    assert listed["eval.datasets[].root"].default == ""

    assert main(["config", "train.lr"]) == 0
    assert capsys.readouterr().out.splitlines() == ["train.lr: number = 0.0016", "    peak of the learning rate"]
    assert main(["config", "model.text"]) == 0
    assert capsys.readouterr().out.count("model.text.") == 5
    assert main(["config", "train.lrr"]) == 2
    assert "did you mean 'train.lr'" in capsys.readouterr().err
    assert main(["config"]) == 0
    assert capsys.readouterr().out.count(": ") >= len(listed)


def test_the_page_of_keys_is_that_of_the_model():
    page = (CONFIGS.parent / "docs" / "configuration.md").read_text()
    assert page == between_markers(page, tables(list(keys(Config)))), "mixreorg config --markdown docs/configuration.md"


def test_a_wrong_value_is_told_what_its_key_means():
    assert problem({"train": {"warmup_steps": -1}}).endswith("got -1 (steps of warm-up; overrides warmup_epochs)")
