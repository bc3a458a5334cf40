"""The embedded scenes are what their captions and masks say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixreorg_fast.config import ScenesConfig
from mixreorg_fast.data.scenes.captions import KIND_WORDS
from mixreorg_fast.data.scenes.folder import ensure_scenes
from mixreorg_fast.data.scenes.painting import GROUNDS, PATTERNS, Painter
from mixreorg_fast.data.scenes.planning import held_out_combinations, plan_scene
from mixreorg_fast.data.scenes.scene import COLOURS, KINDS, SHAPES, Scene, Thing
from mixreorg_fast.data.shards.shard_set import open_shards
from mixreorg_fast.errors import UserError


def settings(folder: Path, **changes) -> ScenesConfig:
    return ScenesConfig(**{"folder": str(folder), "train": 12, "val": 5, "size": 48, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return ensure_scenes(settings(tmp_path_factory.mktemp("scenes") / "scenes"), workers=2, progress=False)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(64, 0)


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".index"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout(made):
    folder = made.evaluation.parent
    assert [path.name for path in made.train] == ["train-000000.tar"] and len(made.val) == 1
    assert len(open_shards([str(made.train[0])])) == 12
    for evaluation in (made.evaluation, made.unseen, made.small):
        classes = (evaluation / "classes.txt").read_text().split("\n")[:-1]
        assert classes == ["background", *KINDS]
        stems = (evaluation / "splits/val.txt").read_text().split()
        assert len(stems) == 5
        for stem in stems:
            image, mask = Image.open(evaluation / f"images/{stem}.jpg"), Image.open(evaluation / f"masks/{stem}.png")
            assert image.size == mask.size == (48, 48)
            labels = np.unique(np.asarray(mask))
            assert labels[0] == 0 and len(labels) >= 2 and labels.max() <= len(KINDS)
    assert not [name for name in os.listdir(folder.parent) if name.endswith(".new")]


def test_masks_show_the_objects_of_the_shard(made):
    shards = open_shards([str(made.val[0])])
    shards.open_for(np.arange(len(shards)))
    for number in range(len(shards)):
        sample = shards.read(number)
        assert sample.image == (made.evaluation / f"images/{sample.key}.jpg").read_bytes()
        mask = np.asarray(Image.open(made.evaluation / f"masks/{sample.key}.png"))
        assert {KINDS[label - 1] for label in np.unique(mask) if label} >= {n for n in sample.nouns if n in KINDS}


def test_a_second_call_draws_nothing_and_new_settings_draw_again(tmp_path):
    config = settings(tmp_path / "s")
    first = ensure_scenes(config, workers=1, progress=False)
    stamp = first.train[0].stat().st_mtime_ns
    ensure_scenes(config, workers=1, progress=False)
    assert first.train[0].stat().st_mtime_ns == stamp
    again = ensure_scenes(settings(tmp_path / "s", seed=1), workers=1, progress=False)
    assert again.train[0].stat().st_mtime_ns != stamp
    assert json.loads((tmp_path / "s/settings.json").read_text())["seed"] == 1


def test_same_settings_give_the_same_bytes(made, tmp_path):
    """Also with another number of processes."""
    again = ensure_scenes(settings(tmp_path / "again"), workers=1, progress=False)
    assert digest(made.evaluation.parent) == digest(again.evaluation.parent)


@pytest.mark.launch
def test_processes_at_once_draw_once(tmp_path):
    code = (
        "import sys; from mixreorg_fast.config import ScenesConfig;"
        "from mixreorg_fast.data.scenes.folder import ensure_scenes;"
        "print(ensure_scenes(ScenesConfig(folder=sys.argv[1], train=30, val=2, size=32), workers=1, progress=False)"
        ".train[0].stat().st_ino)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate()[0] for process in running]
    assert results[0] == results[1] != ""


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("irreplaceable")
    with pytest.raises(UserError, match="does not hold embedded scenes"):
        ensure_scenes(settings(tmp_path / "mine"), progress=False)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_small_objects_are_single_and_half_the_area():
    config, nothing = settings(Path("unused"), objects=(1, 0, 0), scale=1.4), frozenset()
    areas = {}
    for split in ("val", "small"):
        scenes = [plan_scene(config, split, number, nothing) for number in range(400)]
        assert all(len(scene.things) == 1 for scene in scenes)
        areas[split] = np.mean([scene.things[0].size ** 2 for scene in scenes])
    assert areas["small"] == pytest.approx(areas["val"] / 2, rel=0.05)
    several = settings(Path("unused"), objects=(0, 0, 1))
    assert len(plan_scene(several, "small", 0, nothing).things) == 1


def test_unseen_combinations_are_unseen():
    held_out = held_out_combinations(0)
    every = len(KINDS) * len(PATTERNS) * len(COLOURS)
    assert len(held_out) == int(0.1 * every) and held_out == held_out_combinations(0) != held_out_combinations(1)
    used = {split: set() for split in ("train", "val", "unseen")}
    for split, found in used.items():
        for number in range(1500):
            scene = plan_scene(ScenesConfig(), split, number, held_out)
            found |= {(thing.kind, thing.pattern, thing.colour) for thing in scene.things}
    assert used["unseen"] <= held_out and len(used["unseen"]) > 0.9 * len(held_out)
    assert not (used["train"] | used["val"]) & held_out
    # Each kind, pattern and colour is known from training; only their combination is new.
    for place in range(3):
        assert {c[place] for c in used["train"]} >= {c[place] for c in used["unseen"]}


def test_captions_say_true_things():
    held_out = held_out_combinations(0)
    words = {kind: [kind, *KIND_WORDS.get(kind, [])] for kind in KINDS}
    lefts = 0
    for number in range(800):
        scene = plan_scene(ScenesConfig(), "train", number, held_out)
        kinds = {thing.kind for thing in scene.things}
        assert 1 <= len(scene.things) <= 3 and len(kinds) == len(scene.things)
        assert set(scene.nouns) <= kinds | {scene.ground}
        for caption in scene.captions:
            text = caption.lower()
            present = {kind for kind in KINDS if re.search(rf"\b{kind}\b", text)}
            # A synonym may hold another kind's name ("picture frame" does not, "love heart" names its own).
            assert present <= kinds
            said = [kind for kind in kinds if any(re.search(rf"\b{word}\b", text) for word in words[kind])]
            assert said and set(said) <= set(scene.nouns)
            for colour in COLOURS:
                if re.search(rf"\b{colour}\b", text):
                    assert colour in {thing.colour for thing in scene.things} or colour in ("green", "white")
            for before, after in (("left of", 1), ("right of", -1)):
                pair = re.search(
                    rf"(\w+)(?: with \w+(?: \w+)?| in two tones)? (?:to the )?{before} (?:a|an|the|one) ", text
                )
                first = next((t for t in scene.things if pair and pair[1] == t.kind), None)
                if first and len(scene.things) == 2:
                    (second,) = (t for t in scene.things if t is not first)
                    assert after * (second.x - first.x) > 0
                    lefts += 1
    assert lefts > 5


def test_captions_vary():
    held_out = held_out_combinations(0)
    captions = [plan_scene(ScenesConfig(), "train", number, held_out).captions[0] for number in range(1000)]
    assert len(set(captions)) > 950
    assert len({word for caption in captions for word in re.findall(r"[a-z-]+", caption.lower())}) > 130


def test_masks_are_exact(painter):
    """Where an object of a colour far from the ground's is painted, the mask says so, and nowhere else."""
    held_out = held_out_combinations(0)
    for number in range(200):
        scene = plan_scene(ScenesConfig(), "val", number, held_out)
        picture, mask = painter.paint(scene)
        assert picture.shape == (64, 64, 3) and picture.dtype == mask.dtype == np.uint8
        assert {KINDS[label - 1] for label in np.unique(mask) if label} == {thing.kind for thing in scene.things}
        for thing in scene.things:
            rows, columns = np.nonzero(mask == KINDS.index(thing.kind) + 1)
            assert abs(np.ptp(rows) + 1 - 64 * thing.size) < 64 * thing.size  # inside its box
            assert np.abs(columns / 64 - thing.x).max() < 0.75 * thing.size + 0.05
            assert np.abs(rows / 64 - thing.y).max() < 0.75 * thing.size + 0.05
    # The picture without its objects differs from the one with them exactly on the mask, but for smoothed edges.
    scene = plan_scene(ScenesConfig(), "val", 3, held_out)
    with_things, mask = painter.paint(scene)
    bare, _ = painter.paint(replace(scene, things=()))
    if np.abs(with_things[mask == 0].astype(int) - bare[mask == 0]).mean() < 3:  # the same family was drawn
        changed = np.abs(with_things.astype(int) - bare).sum(axis=-1) > 0
        assert changed[mask > 0].mean() > 0.97
        assert changed[mask == 0].mean() < 0.1


def test_kinds_have_their_own_outlines(painter):
    """No two kinds, drawn alike at 24 px, overlap so much that they could be taken for one another."""
    outlines = {}
    for kind in SHAPES:
        thing = Thing(kind, "plain", "red", 0.5, 0.5, 0.375, 0.0, False)
        outlines[kind] = painter.paint(Scene("snow", (thing,), (), (), 0))[1] > 0
        assert 60 < outlines[kind].sum() < 640
    for first in KINDS:
        for second in KINDS:
            if first < second:
                a, b = outlines[first], outlines[second]
                assert (a & b).sum() / (a | b).sum() < 0.9, (first, second)


def test_no_ground_identifies_a_picture(painter):
    held_out = held_out_combinations(0)
    grounds = [plan_scene(ScenesConfig(), "train", number, held_out).ground for number in range(2000)]
    assert set(grounds) == set(GROUNDS)
    assert min(grounds.count(ground) for ground in GROUNDS) > 100


def test_easier_scenes():
    """Fewer and larger objects, few grounds, looks typical of a kind, captions that tell little."""
    easy = ScenesConfig(objects=(1, 0, 0), scale=1.4, grounds=2, typical=1.0, detail=0.0)
    scenes = [plan_scene(easy, "train", number, frozenset()) for number in range(300)]
    assert {len(scene.things) for scene in scenes} == {1}
    assert {scene.ground for scene in scenes} == set(list(GROUNDS)[:2])
    assert min(scene.things[0].size for scene in scenes) >= 0.56
    looks = {}
    for scene in scenes:
        looks.setdefault(scene.things[0].kind, set()).add((scene.things[0].pattern, scene.things[0].colour))
    assert len(looks) == len(KINDS) and all(len(look) <= 2 for look in looks.values())
    assert len({frozenset(look) for look in looks.values() if len(look) == 2}) == sum(
        len(look) == 2 for look in looks.values()
    )
    told = " ".join(caption.lower() for scene in scenes for caption in scene.captions)
    assert not any(word in told.split() for word in (*COLOURS, "striped", "dotted", "grass"))
