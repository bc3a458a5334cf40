"""``mixreorg study``: what its file says, what it trains, resumes, compares and writes."""

import json
import re
import shutil

import pytest

from mixreorg_fast import ledger
from mixreorg_fast.cli import main
from mixreorg_fast.config import load_config
from mixreorg_fast.errors import UserError
from mixreorg_fast.study.command import _shares
from mixreorg_fast.study.plan import Study
from mixreorg_fast.study.report import study_table, training_seconds, write_page, write_study_rows
from tests import markdown
from tests.training.test_train import ROOT, settings

STUDY = {
    "name": "tiny",
    "seeds": [0, 1],
    "datasets": {"scenes": {"config": "base.json", "set": {"train.log_every": 1}}},
    "variants": {
        "groupvit": {"about": "GroupViT", "set": {"model.method": "groupvit"}},
        "full": {"about": "MixReorg", "set": {}},
        "soft": {"about": "soft assignment", "set": {"model.hard_assignment": False}},
    },
    "blocks": {
        "main": {
            "dataset": "scenes",
            "variants": ["groupvit", "full"],
            "equal_time": {"like": "full", "variants": ["groupvit"]},
        },
        "more": {"dataset": "scenes", "variants": ["full", "soft"], "seeds": [1]},
    },
}


def write_study(folder, **changes):
    one_rank = {"batch": 8, "accumulation": 1, "steps": 2, "log_every": 1, "precision": "fp32"}
    base = settings(folder, train=one_rank, checkpoint={"every": 1, "keep": 1})
    (folder / "base.json").write_text(json.dumps(base))
    path = folder / "study.json"
    path.write_text(json.dumps({**STUDY, "output": str(folder / "runs"), **changes}))
    return path


def test_runs_of_several_blocks_are_trained_once(tmp_path):
    study = Study(write_study(tmp_path))
    runs = study.runs
    assert [(run.variant, run.seed) for run in runs] == [
        ("groupvit", 0),
        ("full", 0),
        ("groupvit", 1),
        ("full", 1),
        ("soft", 1),
    ]
    assert study.timed == [("scenes", "groupvit", "full", 0), ("scenes", "groupvit", "full", 1)]
    assert [run.variant for run in Study(study.path, ["more"]).runs] == ["full", "soft"]
    names = {name for _, name in Study(study.path, ["more"]).names()}
    assert names == {run.folder.name for run in runs} | {"groupvit_time_seed0", "groupvit_time_seed1"}
    soft = study.run("scenes", "soft", 1, steps=7)
    assert (soft.config.model.hard_assignment, soft.config.seed, soft.config.train.steps) == (False, 1, 7)
    assert soft.folder == tmp_path / "runs/tiny/scenes/soft_time_seed1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"groupvit": {"about": "x", "set": {"model.metod": 1}}}}, "no variant 'full'"),
        (
            {"blocks": {"a": {"dataset": "scene", "variants": ["full"]}}},
            "no dataset 'scene' (did you mean 'scenes'?)",
        ),
        ({"variants": {**STUDY["variants"], "full": {"about": "x", "set": {"model.metod": 1}}}}, "'model.metod'"),
        ({"datasets": {"scenes": {"config": "bas.json"}}}, "bas.json (did you mean"),
        ({"seed": [1]}, "unknown key 'seed' (did you mean 'seeds'?)"),
        (
            {
                "blocks": {
                    "a": {
                        "dataset": "scenes",
                        "variants": ["full"],
                        "equal_time": {"like": "soft", "variants": ["full"]},
                    }
                }
            },
            "equal_time needs 'soft' among the block's variants",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tmp_path, capsys, changes, message):
    assert main(["study", str(write_study(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_former_keys_are_accepted_with_one_line(tmp_path, capsys):
    path = write_study(tmp_path)
    now = Study(path)
    assert capsys.readouterr().err == ""
    path.write_text(path.read_text().replace('"datasets"', '"worlds"').replace('"dataset"', '"world"'))
    assert Study(path).config == now.config
    assert capsys.readouterr().err.count("are now 'datasets' and 'dataset'\n") == 1


def test_an_unknown_block_or_file_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=re.escape("no block 'mian' (did you mean 'main'?)")):
        Study(write_study(tmp_path), ["mian"])
    with pytest.raises(UserError, match="no study file"):
        Study(tmp_path / "studi.json")


@pytest.mark.slow
def test_a_study_trains_resumes_and_writes_its_page(tmp_path, capsys):
    pytest.importorskip("deepspeed")
    path = write_study(tmp_path, seeds=[0])
    places = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    command = ["study", str(path), "--block", "main", "--jobs", "2", *places]
    assert main(command) == 0, capsys.readouterr()
    folder = tmp_path / "runs/tiny/scenes"
    time_run = load_config(folder / "groupvit_time_seed0.json")
    assert time_run.model.method == "groupvit" and time_run.train.steps >= 1
    (results,) = (tmp_path / "results").iterdir()
    rows = json.loads(results.read_text())["rows"]
    kinds = {(row["variant"], row["budget"], row["world"]) for row in rows}
    variants = [("groupvit", "steps"), ("full", "steps"), ("groupvit", "time")]
    assert kinds == {(*variant, world) for variant in variants for world in ("scenes", "scenes_unseen", "scenes_small")}
    page = (tmp_path / "docs/results.md").read_text()
    assert {"GroupViT, equal time", "MixReorg"} <= {cells.get("variant") for cells in markdown.rows(page)}
    for picture in re.findall(r"\]\((images/\S+\.png)\)", page):
        assert (tmp_path / "docs" / picture).read_bytes().startswith(b"\x89PNG")
    assert page.count("](images/") == 2

    # What is finished is not trained again; what is missing is.
    before = {run.name: run.stat().st_mtime_ns for run in folder.glob("*/eval.json")}
    capsys.readouterr()
    assert main([*command, "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["finished"] * 3
    assert main(command) == 0
    assert "training" not in capsys.readouterr().out
    assert before == {run.name: run.stat().st_mtime_ns for run in folder.glob("*/eval.json")}
    shutil.rmtree(folder / "full_seed0")
    variants = {**STUDY["variants"], "groupvit": {"about": "G", "set": {"train.lr": 1e-3, "model.method": "groupvit"}}}
    write_study(tmp_path, seeds=[0], variants=variants)
    main([*command, "--list"])
    states = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["to train", "to train", "to measure"]


def test_processors_are_shared_out():
    assert _shares([0, 1, 2, 3, 6], 2) == [[0, 2, 6], [1, 3]]
    assert _shares([4, 5], 3) == [[4], [5], [4, 5]]


def row(variant, seed, miou, *, budget="steps", world="scenes"):
    described = {"suite": "study", "study": "s", "trained_on": "scenes", "run": f"{variant}_{budget}_{seed}"}
    figures = {"seconds": 10.0, "steps": 5, "images_seen": 40, "oracle_miou": 30.0, "groups_used": 2.0, "images": 8}
    return {
        **described,
        **figures,
        **{"variant": variant, "about": variant.title(), "seed": seed, "budget": budget, "world": world},
        **{"miou": miou, "all_background_miou": 3.0},
    }


def test_tables_hold_means_deviations_and_distances():
    rows = [row("base", 0, 10.0), row("base", 1, 12.0), row("full", 0, 15.0), row("full", 1, 19.0)]
    table = study_table([*rows, row("base", 0, 12.0, budget="time"), row("base", 1, 12.0, budget="time")])
    base, full, longer = markdown.rows("\n".join(table))
    columns = ("variant", "seeds", "steps", "seconds", "scenes mIoU", "against the first")
    assert [base[column] for column in columns] == ["Base", "2", "5", "10", "11.00 ± 1.41", ""]
    assert [full[column] for column in columns] == ["Full", "2", "5", "10", "17.00 ± 2.83", "+6.00 ± 3.16"]
    assert [longer[column] for column in columns] == ["Base, equal time", "2", "5", "10", "12.00", "+1.00 ± 1.41"]
    assert base["oracle mIoU"] == "30.00"


def test_frequent_classes_have_a_column_where_not_all_are():
    voc = [row("base", seed, 4.0, world="voc") | {"frequent_miou": 6.0 + 2 * seed} for seed in (0, 1)]
    road = [row("base", seed, 5.0, world="road") | {"frequent_miou": 5.0} for seed in (0, 1)]
    head, *lines = study_table([*voc, *road])
    assert head.count("classes in 30 photos") == 1
    (cells,) = markdown.rows("\n".join([head, *lines]))
    assert (cells["voc mIoU"], cells["classes in 30 photos"], cells["road mIoU"]) == ("4.00", "7.00 ± 1.41", "5.00")


def test_naming_whole_photos_and_retrieval_have_columns_where_they_were_scored():
    scored = [row("base", seed, 4.0) | {"whole_photo_miou": 5.0, "image_to_text": 8.0 + 2 * seed} for seed in (0, 1)]
    (cells,) = markdown.rows("\n".join(study_table(scored)))
    assert (cells["whole photo by one name"], cells["R@1 image to text"]) == ("5.00", "9.00 ± 1.41")
    assert "R@1 text to image" not in cells
    (head, *_) = study_table([row("base", 0, 4.0)])
    assert "whole photo" not in head and "R@1" not in head


def test_rows_replace_those_of_the_same_run_and_the_page_follows(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    write_study_rows([row("base", 0, 1.0), row("full", 0, 2.0)], results / "study_x.json", "command")
    write_study_rows([row("base", 0, 3.0)], results / "study_x.json", "command")
    kept = json.loads((results / "study_x.json").read_text())["rows"]
    assert [(r["variant"], r["miou"]) for r in kept] == [("full", 2.0), ("base", 3.0)]
    write_study_rows([], results / "study_x.json", "command", {"s": {("scenes", "base_steps_0")}, "other": set()})
    kept = json.loads((results / "study_x.json").read_text())["rows"]
    assert [r["variant"] for r in kept] == ["base"]
    write_study_rows([row("full", 0, 2.0)], results / "study_x.json", "command")
    docs.mkdir()
    (docs / "results.md").write_text(f"# Words\n\n{ledger.BEGIN}\nold\n{ledger.END}\n\nmore words\n")
    assert write_page(results, docs, check=True) and "old" in (docs / "results.md").read_text()
    assert write_page(results, docs) and not write_page(results, docs)
    page = (docs / "results.md").read_text()
    assert page.startswith("# Words") and page.endswith("more words\n") and "old" not in page
    assert "Full" in {cells["variant"] for cells in markdown.rows(page)}
    (docs / "results.md").write_text(ledger.BEGIN)
    with pytest.raises(UserError, match="must hold"):
        write_page(results, docs)


def test_the_time_of_a_run_is_that_of_its_steps():
    reports = [{"samples": 100, "images_per_s": 50.0}, {"samples": 300, "images_per_s": 100.0}]
    assert training_seconds(reports) == pytest.approx(2.0 + 2.0)


@pytest.mark.parametrize("name", ["study.json", "study_cpu.json", "study_photos_cpu.json", "study_trials.json"])
def test_the_studies_of_this_project_are_sound(name):
    study = Study(ROOT / "configs" / name)
    assert all(run.variant and run.config.micro_batch(1) for run in study.runs)
    seeds = [len(block.seeds or study.config.seeds) for block in study.config.blocks.values()]
    if name in ("study.json", "study_cpu.json"):
        assert min(seeds) >= 3
    else:  # the baseline is tuned no less than the method
        methods = [run.config.model.method for run in study.runs]
        assert methods.count("groupvit") >= methods.count("mixreorg")
