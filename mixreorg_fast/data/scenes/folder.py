"""The folder of the embedded scenes: procedurally drawn pictures with captions and exact masks.

A scene shows one to three objects on a textured ground. An object has a kind (the classes of evaluation), a pattern and
a colour. Captions name them in varying words and leave things out, as people do. Some combinations of the three are
held out of training and make the second evaluation folder, ``unseen``. The third, ``small``, shows single objects at
half the area: where an object fills much of its picture, naming the whole picture after it scores well without any
segmentation, and here it does not.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...config import Config, EvalDatasetConfig, ScenesConfig
from ...errors import UserError
from ...files import atomic_path, json_or_empty, write_json
from ...palette import voc_palette
from ..shards.pair import Pair, write_shard
from ..shards.processes import advance, in_processes
from .painting import Painter
from .planning import held_out_combinations, plan_scene
from .scene import KINDS

FORMAT = 3  # raised when the same settings would draw other scenes
PER_SHARD = 1000
JPEG_QUALITY = 95
# Chosen for these scenes: at VOC's 0.95 nearly every segment is background; both methods score best at 0.2 or 0.3.
BACKGROUND_THRESHOLD = 0.3
SPLITS = ("train", "val", "unseen", "small")


class ScenePaths(NamedTuple):
    """What :func:`ensure_scenes` leaves: shards, and folders in the plain evaluation layout."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    evaluation: Path
    unseen: Path
    small: Path


def with_scenes(config: Config) -> Config:
    """`config` with ``data.shards`` set: where they are null, the embedded scenes become its training, retrieval and,
    unless it names others, evaluation data. They are drawn first where absent (:func:`ensure_scenes`)."""
    if config.data.shards is not None:
        return config
    scenes = ensure_scenes(config.data.scenes)
    train, val = (list(map(str, paths)) for paths in (scenes.train, scenes.val))
    data = config.data.model_copy(update={"shards": train, "val_shards": config.data.val_shards or val})
    folders = {"scenes": scenes.evaluation, "scenes_unseen": scenes.unseen, "scenes_small": scenes.small}
    datasets = config.eval.datasets or [
        EvalDatasetConfig(name=name, root=str(folder), background_threshold=BACKGROUND_THRESHOLD)
        for name, folder in folders.items()
    ]
    return config.model_copy(update={"data": data, "eval": config.eval.model_copy(update={"datasets": datasets})})


def ensure_scenes(config: ScenesConfig, *, workers: int | None = None, progress: bool = True) -> ScenePaths:
    """The scenes of these settings in ``config.folder``; drawn first where absent or made with other settings.

    Several processes may call this at once: one draws, the others wait. The folder appears complete or not at all.

    Raises:
        UserError: the folder exists and holds something else, or cannot be written.
    """
    folder = Path(config.folder)
    settings = {"format": FORMAT, **config.model_dump(mode="json", exclude={"folder"})}
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released even when this process dies
            if json_or_empty(folder / "settings.json") != settings:
                _replace(folder, config, settings, workers or len(os.sched_getaffinity(0)), progress)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: cannot hold the scenes: {reason}; set data.scenes.folder") from None
    shards = {split: tuple(sorted(folder.glob(f"{split}-*.tar"))) for split in ("train", "val")}
    return ScenePaths(shards["train"], shards["val"], folder / "val", folder / "unseen", folder / "small")


def _replace(folder: Path, config: ScenesConfig, settings: dict, workers: int, progress: bool) -> None:
    """Draw everything beside `folder`, by several processes, then let it take the folder's place."""
    if folder.exists() and not json_or_empty(folder / "settings.json") and any(folder.iterdir()):
        raise UserError(
            f"{folder} exists and does not hold embedded scenes; move it, or set data.scenes.folder to another"
        )
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed; this process holds the lock
    scenes = {split: range(config.train if split == "train" else config.val) for split in SPLITS}
    pieces = [(split, every[at : at + PER_SHARD]) for split, every in scenes.items() for at in every[::PER_SHARD]]
    bar = {"total": sum(map(len, scenes.values())), "unit": "scene", "desc": "draw scenes", "disable": not progress}
    with atomic_path(folder) as fresh:
        fresh.mkdir()
        for split in SPLITS[1:]:
            for name in ("images", "masks", "splits"):
                (fresh / split / name).mkdir(parents=True)
            (fresh / split / "classes.txt").write_text("\n".join(("background", *KINDS)) + "\n")
            stems = [f"{split}{number:06d}" for number in scenes[split]]
            (fresh / split / "splits" / "val.txt").write_text("\n".join(stems) + "\n")
        list(in_processes(partial(_draw_piece, fresh, config), pieces, workers, **bar))  # waits for all of them
        write_json(fresh / "settings.json", settings)


_painter = lru_cache(maxsize=1)(Painter)  # its textures take longer than a small piece


def _draw_piece(folder: Path, config: ScenesConfig, piece: tuple[str, range]) -> None:
    """Draw the scenes of a split with some numbers: a shard, and for evaluation their pictures and masks."""
    split, numbers = piece
    painter, held_out = _painter(config.size, config.seed), held_out_combinations(config.seed)

    def pairs() -> Iterator[Pair]:
        for number in numbers:
            scene = plan_scene(config, split, number, held_out)
            picture, mask = painter.paint(scene)
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            objects = [{"kind": thing.kind, "pattern": thing.pattern, "colour": thing.colour} for thing in scene.things]
            fields = {"nouns": list(scene.nouns), "ground": scene.ground, "objects": objects}
            pair = Pair(f"{split}{number:06d}", encoded.getvalue(), "jpg", scene.captions, fields)
            if split != "train":
                (folder / split / "images" / f"{pair.key}.jpg").write_bytes(pair.image)
                image = Image.fromarray(mask)
                image.putpalette(voc_palette().flatten().tolist())
                image.save(folder / split / "masks" / f"{pair.key}.png")
            advance(1)
            yield pair

    # Evaluation splits are written as shards too, so that retrieval can be scored on them.
    write_shard(folder / f"{split}-{numbers.start // PER_SHARD:06d}.tar", pairs())
