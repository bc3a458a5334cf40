"""Embedded data: procedurally drawn scenes with captions and exact masks.

A scene shows one to three objects on a textured ground. An object has a kind (:data:`KINDS`, the classes of
evaluation), a pattern and a colour; captions name them in varying words and leave things out, as people do. Some
combinations of the three are held out of training and make the second evaluation folder, ``unseen``. The third,
``small``, shows single objects at half the area: where an object fills much of its picture, naming the whole picture
after it scores well without any segmentation, and here it does not.

Scene i of a split is a pure function of (seed, split, i). The drawing itself is in ``drawing.py``; this module
decides what is drawn, what is said about it, and where it is stored: the same shards and the same evaluation layout
as real data, written by the same code.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...config import Config, EvalDatasetConfig, ScenesConfig
from ...errors import UserError
from ...files import write_json
from ..shards.pair import Pair
from ..shards.write import write_shard
from .drawing import GROUNDS, PATTERNS, SHAPES, Painter, Placed

FORMAT = 3  # raised when the same settings would draw other scenes
PER_SHARD = 1000
HELD_OUT = 0.1  # share of the (kind, pattern, colour) combinations kept from training
JPEG_QUALITY = 95

KINDS = tuple(SHAPES)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (242, 132, 32),
    "yellow": (246, 214, 48),
    "green": (48, 160, 60),
    "turquoise": (50, 200, 190),
    "blue": (40, 90, 214),
    "purple": (124, 58, 180),
    "pink": (246, 136, 180),
    "brown": (124, 76, 40),
    "black": (28, 28, 30),
    "grey": (136, 138, 142),
    "white": (246, 246, 246),
}

KIND_WORDS = {
    "circle": ["disc"],
    "square": ["box", "block"],
    "triangle": ["wedge"],
    "heart": ["love heart"],
    "cross": ["plus sign"],
    "crescent": ["moon", "crescent moon"],
    "ring": ["hoop", "doughnut"],
    "arrow": ["pointer"],
    "diamond": ["rhombus"],
    "oval": ["ellipse", "egg"],
    "drop": ["droplet", "teardrop"],
    "bolt": ["lightning bolt", "flash"],
    "house": ["hut", "cottage"],
    "flower": ["blossom"],
    "mushroom": ["toadstool"],
    "tree": ["fir", "pine"],
    "frame": ["picture frame"],
    "bow": ["bow tie"],
    "boat": ["sailboat", "ship"],
}
COLOUR_WORDS = {"purple": ["violet"], "grey": ["gray"], "turquoise": ["teal"], "red": ["scarlet"], "black": ["dark"]}
# Before the noun, and after it.
PATTERN_WORDS = {
    "striped": (["striped", "stripy"], ["with stripes"]),
    "dotted": (["dotted", "spotted", "polka dot"], ["with dots", "with spots"]),
    "checked": (["checked", "checkered", "chequered"], ["with a check pattern", "with checks"]),
    "grid": (["gridded", "latticed"], ["with a grid", "with grid lines"]),
    "two-tone": (["two-tone", "half white"], ["in two tones"]),
    "plain": (["plain", "solid"], ["without any pattern"]),
}
GROUND_WORDS = {
    "grass": ["on the grass", "on a lawn", "in a meadow", "on green grass"],
    "sand": ["on the sand", "on a beach", "in the desert", "on sand"],
    "water": ["on the water", "in water", "floating on a lake", "on the sea"],
    "brick": ["on a brick wall", "in front of bricks", "against a wall of brick", "on the bricks"],
    "snow": ["in the snow", "on snow", "on fresh snow"],
    "wood": ["on wood", "on a wooden floor", "on wooden planks", "on the table"],
    "gravel": ["on gravel", "on the stones", "on pebbles"],
    "tiles": ["on tiles", "on a tiled floor", "in front of tiles"],
    "mud": ["in the mud", "on the soil", "on muddy ground"],
    "leaves": ["on leaves", "among the leaves", "on fallen leaves"],
    "sky": ["in the sky", "against a cloudy sky", "up in the clouds"],
    "cloth": ["on cloth", "on a carpet", "on woven cloth"],
}
# Like GroupViT's, set for the data. At VOC's 0.95 nearly every segment is background. Both methods score best at 0.2
# or 0.3.
BACKGROUND_THRESHOLD = 0.3
SPLITS = ("train", "val", "unseen", "small")


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `x`, `y`: its middle; `size`: its longer side; all as shares of the picture's side."""

    kind: str
    pattern: str
    colour: str
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    ground: str
    things: tuple[Thing, ...]  # painted in this order
    captions: tuple[str, ...]
    nouns: tuple[str, ...]  # kinds and ground that the captions speak of
    picture_seed: int


@dataclass(frozen=True)
class ScenePaths:
    """What :func:`ensure_scenes` leaves: shards, and folders in the plain evaluation layout."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    evaluation: Path
    unseen: Path
    small: Path


def ensure_scenes(config: ScenesConfig, *, workers: int | None = None, progress: bool = True) -> ScenePaths:
    """The scenes of these settings in ``config.folder``; drawn first where absent or made with other settings.

    Several processes may call this at once: one draws, the others wait. The folder appears whole or not at all.

    Raises:
        UserError: the folder exists and holds something else, or cannot be written.
    """
    folder = Path(config.folder)
    settings = {"format": FORMAT, **config.model_dump(mode="json", exclude={"folder"})}
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if _settings_of(folder) != settings:
                _replace(folder, config, settings, workers or os.cpu_count() or 1, progress)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot hold the scenes: {error.strerror or error}; set data.scenes.folder"
        ) from None
    shards = {split: tuple(sorted(folder.glob(f"{split}-*.tar"))) for split in ("train", "val")}
    return ScenePaths(shards["train"], shards["val"], folder / "val", folder / "unseen", folder / "small")


def with_scenes(config: Config) -> Config:
    """`config` with ``data.shards`` set: where they are null, the embedded scenes become its training, retrieval and,
    unless it names others, evaluation data. They are drawn first where absent.

    Raises:
        UserError: as :func:`ensure_scenes`.
    """
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


def plan_scene(config: ScenesConfig, split: str, number: int, held_out: frozenset[tuple[str, str, str]]) -> Scene:
    """What scene `number` of a split shows and how it is described."""
    rng = random.Random(f"{config.seed}/{split}/{number}")  # a string's hash there is the same on every machine
    # In "unseen" every object is a held-out combination; the same sentence covers the other splits the other way.
    combinations: list[tuple[str, str, str]] = []
    small = split == "small"
    wanted = 1 if small else rng.choices((1, 2, 3), weights=config.objects)[0]
    pool = sorted(held_out) if split == "unseen" else None
    while len(combinations) < wanted:
        if pool is not None:
            candidate = rng.choice(pool)
        else:
            candidate = _combination(config.typical, rng)
            if candidate in held_out:
                continue
        if candidate[0] not in [kind for kind, *_ in combinations]:
            combinations.append(candidate)
    things = _placed(combinations, config.scale * (0.5**0.5 if small else 1.0), rng)
    ground = rng.choice(tuple(GROUNDS)[: config.grounds])
    said: dict[str, None] = {}
    captions = tuple(_caption(things, ground, config.detail, rng, said) for _ in range(2))
    return Scene(ground, things, captions, tuple(said), rng.getrandbits(32))


def held_out_combinations(seed: int) -> frozenset[tuple[str, str, str]]:
    """(kind, pattern, colour) that never occur in training or in ``val``."""
    every = [(kind, pattern, colour) for kind in KINDS for pattern in PATTERNS for colour in COLOURS]
    return frozenset(random.Random(f"{seed}/held out").sample(every, int(HELD_OUT * len(every))))


def render(scene: Scene, painter: Painter) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 ``[S, S, 3]``, and its mask, uint8 ``[S, S]``: 0 ground, k the k-th of :data:`KINDS`."""
    placed = [
        Placed(KINDS.index(t.kind) + 1, t.kind, t.pattern, COLOURS[t.colour], t.x, t.y, t.size, t.angle, t.mirrored)
        for t in scene.things
    ]
    return painter.paint(scene.ground, placed, random.Random(scene.picture_seed))


def pair_of(scene: Scene, split: str, number: int, picture: np.ndarray) -> Pair:
    """The sample of a scene, as it goes into a shard."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    fields = {
        "nouns": list(scene.nouns),
        "ground": scene.ground,
        "objects": [{name: asdict(thing)[name] for name in ("kind", "pattern", "colour")} for thing in scene.things],
    }
    return Pair(f"{split}{number:06d}", encoded.getvalue(), "jpg", scene.captions, fields)


def _combination(typical: float, rng: random.Random) -> tuple[str, str, str]:
    """A kind with a pattern and a colour: its own with probability `typical` each, else any."""
    kind, patterns, colours = rng.choice(KINDS), tuple(PATTERNS), tuple(COLOURS)
    number = KINDS.index(kind)
    # Two colours and a pattern to a kind, spread so that no two kinds share all of them.
    own_colour = colours[(5 * number + rng.choice((0, 3))) % len(colours)]
    own_pattern = patterns[(number + 3 * (number // len(colours))) % len(patterns)]
    colour = own_colour if rng.random() < typical else rng.choice(colours)
    pattern = own_pattern if rng.random() < typical else rng.choice(patterns)
    return kind, pattern, colour


def _placed(combinations: Sequence[tuple[str, str, str]], scale: float, rng: random.Random) -> tuple[Thing, ...]:
    """Objects at random places inside the picture, overlapping a little at most."""
    # Shortest and longest, as shares of the picture's side, and the most that finds room beside the others.
    low, high, most = {1: (0.40, 0.60, 0.90), 2: (0.32, 0.48, 0.56), 3: (0.27, 0.40, 0.44)}[len(combinations)]
    low, high = (min(side * scale, most) for side in (low, high))
    while True:
        things: list[Thing] = []
        for kind, pattern, colour in combinations:
            for _ in range(20):
                size = rng.uniform(low, high)
                x, y = (rng.uniform(size / 2 + 0.01, 0.99 - size / 2) for _ in range(2))
                if all(np.hypot(x - t.x, y - t.y) > 0.42 * (size + t.size) for t in things):
                    swing = SHAPES[kind].swing
                    angle, mirrored = rng.uniform(-swing, swing), rng.random() < 0.5
                    things.append(Thing(kind, pattern, colour, x, y, size, angle, mirrored))
                    break
        if len(things) == len(combinations):
            return tuple(things)


def _caption(things: Sequence[Thing], ground: str, detail: float, rng: random.Random, said: dict[str, None]) -> str:
    """One way to describe a scene; what it speaks of is added to `said`."""
    order = rng.sample(things, len(things))
    if len(order) > 1 and rng.random() < 0.15:
        order = order[:-1]  # people do not mention everything
    said.update(dict.fromkeys(thing.kind for thing in order))
    phrases = [_describe(thing, detail, rng) for thing in order]
    if len(order) >= 2 and rng.random() < 0.4:
        subject = f"{phrases[0]} {_relation(order[0], order[1], rng)} {phrases[1]}"
        if len(order) == 3:
            subject += f"{rng.choice((' and', ', with', ' near'))} {phrases[2]}"
    elif len(order) == 3:
        subject = f"{phrases[0]}, {phrases[1]} {rng.choice(('and', 'and also'))} {phrases[2]}"
    else:
        subject = rng.choice((" and ", " with ", " together with ")).join(phrases)
    where = ""
    if rng.random() < 0.65 * detail:
        where = rng.choice(GROUND_WORDS[ground])
        said[ground] = None
    plural = len(order) > 1 and " and " in subject
    sentence = rng.choices(
        (
            f"{subject} {where}",
            f"{where}{',' if where else ''} {subject}",
            f"there {'are' if plural else 'is'} {subject} {where}",
            f"a picture of {subject} {where}",
            f"{subject} can be seen {where}",
            f"we see {subject} {where}",
            f"{subject} {rng.choice(('lie', 'sit')) + ('' if plural else 's')} {where}" if where else subject,
        ),
        weights=(8, 2, 3, 2, 1, 1, 2),
    )[0]
    sentence = " ".join(sentence.split())
    if rng.random() < 0.6:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + rng.choice(("", "", ".", " ."))


def _describe(thing: Thing, detail: float, rng: random.Random) -> str:
    """A noun phrase: article, perhaps size, pattern and colour in either order, the kind or a synonym of it."""
    noun = thing.kind
    if thing.kind in KIND_WORDS and rng.random() < 0.25:
        noun = rng.choice(KIND_WORDS[thing.kind])
    adjectives, after = [], ""
    if rng.random() < 0.85 * detail:
        words = COLOUR_WORDS.get(thing.colour, [])
        adjectives.append(rng.choice(words) if words and rng.random() < 0.25 else thing.colour)
    if rng.random() < (0.1 if thing.pattern == "plain" else 0.65) * detail:
        before, behind = PATTERN_WORDS[thing.pattern]
        if rng.random() < 0.7:
            adjectives.insert(rng.randint(0, len(adjectives)), rng.choice(before))
        else:
            after = " " + rng.choice(behind)
    if rng.random() < 0.15 and not 0.33 < thing.size < 0.45:
        adjectives.insert(0, rng.choice(("large", "big") if thing.size >= 0.45 else ("small", "little")))
    phrase = " ".join([*adjectives, noun])
    article = rng.choices(("a", "the", "one"), weights=(8, 1, 1))[0]
    if article == "a" and phrase[0] in "aeiou" and not phrase.startswith("one"):
        article = "an"
    return f"{article} {phrase}{after}"


def _relation(first: Thing, second: Thing, rng: random.Random) -> str:
    """A true preposition between two objects."""
    across, down = second.x - first.x, second.y - first.y
    choices = ["next to", "beside", "near"]
    if abs(across) > 1.5 * abs(down):
        choices += ["left of", "to the left of"] if across > 0 else ["right of", "to the right of"]
    elif abs(down) > 1.5 * abs(across):
        choices += ["above", "over"] if down > 0 else ["below", "under"]
    return rng.choice(choices)


def _settings_of(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def _replace(folder: Path, config: ScenesConfig, settings: dict, workers: int, progress: bool) -> None:
    """Draw everything beside `folder`, then let it take the folder's place."""
    if folder.exists() and _settings_of(folder) is None and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no scenes of ours; move it, or set data.scenes.folder to another")
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed; the lock is ours
    try:
        fresh.mkdir()
        for split in SPLITS[1:]:
            for name in ("images", "masks", "splits"):
                (fresh / split / name).mkdir(parents=True)
            (fresh / split / "classes.txt").write_text("\n".join(("background", *KINDS)) + "\n")
            stems = [f"{split}{number:06d}" for number in range(config.val)]
            (fresh / split / "splits" / "val.txt").write_text("\n".join(stems) + "\n")
        _draw_all(fresh, config, workers, progress)
        write_json(fresh / "settings.json", settings)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _draw_all(folder: Path, config: ScenesConfig, workers: int, progress: bool) -> None:
    """Share the pieces (one shard each) among processes of their own.

    Plain subprocesses rather than multiprocessing: neither are threads forked, nor is the caller's main module (a
    training script) imported again.
    """
    totals = {split: config.train if split == "train" else config.val for split in SPLITS}
    pieces = [
        {"split": split, "first": first, "count": min(PER_SHARD, totals[split] - first)}
        for split in SPLITS
        for first in range(0, totals[split], PER_SHARD)
    ]
    workers = min(workers, len(pieces))
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    # numpy's threads would only fight over the cores.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    settings = config.model_dump() | {"folder": str(folder)}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=sum(totals.values()), unit="scene", desc="draw scenes", disable=not progress)
        )
        processes = []
        for worker in range(workers):
            job = {"config": settings, "pieces": pieces[worker::workers]}
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", f"from {__name__} import _work; _work()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    text=True,
                )
            )
            stack.callback(process.kill)  # on the way out of an error; nothing to a finished one
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            processes.append(process)
        readers = [threading.Thread(target=_follow, args=(process.stdout, bar)) for process in processes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        if any(process.wait() for process in processes):
            raise UserError(f"drawing the scenes into {folder} failed; the reason is printed above")


def _follow(lines: IO[str], bar: tqdm) -> None:
    for line in lines:
        bar.update(int(line))


def _work() -> None:
    """A drawing process: its job comes as JSON on stdin, and it prints the number of scenes of each finished piece."""
    job = json.load(sys.stdin)
    config = ScenesConfig.model_validate(job["config"])
    painter = Painter(config.size, config.seed)
    for piece in job["pieces"]:
        _draw_piece(config, painter, **piece)
        print(piece["count"], flush=True)


def _draw_piece(config: ScenesConfig, painter: Painter, *, split: str, first: int, count: int) -> None:
    """Draw scenes first … first + count - 1 of a split: a shard, and for evaluation their pictures and masks."""
    folder = Path(config.folder)
    held_out = held_out_combinations(config.seed)

    def pairs() -> Iterator[Pair]:
        for number in range(first, first + count):
            scene = plan_scene(config, split, number, held_out)
            picture, mask = render(scene, painter)
            pair = pair_of(scene, split, number, picture)
            if split != "train":
                (folder / split / "images" / f"{pair.key}.jpg").write_bytes(pair.image)
                image = Image.fromarray(mask)
                image.putpalette(_palette())
                image.save(folder / split / "masks" / f"{pair.key}.png")
            yield pair

    # The held-out combinations are shards too: retrieval can be scored on them as on any others.
    write_shard(folder / f"{split}-{first // PER_SHARD:06d}.tar", pairs())


def _palette() -> list[int]:
    """Pascal VOC's colours, so that masks can be looked at."""
    colours = []
    for label in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (label >> channel & 1) << (7 - bit)
            label >>= 3
        colours += channels
    return colours


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` among processes; it is released even when the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
