"""Planning a scene: what it shows, and where.

Scene i of a split is a pure function of (seed, split, i).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ...config import ScenesConfig
from .captions import caption
from .painting import GROUNDS, PATTERNS
from .scene import COLOURS, KINDS, SHAPES, Scene, Thing

HELD_OUT = 0.1  # share of the (kind, pattern, colour) combinations kept from training


def plan_scene(config: ScenesConfig, split: str, number: int, held_out: frozenset[tuple[str, str, str]]) -> Scene:
    """Scene `number` of a split: ``train``, ``val``, ``unseen`` (every object a held-out combination) or ``small``."""
    rng = random.Random(f"{config.seed}/{split}/{number}")  # a string's hash there is the same on every machine
    combinations: list[tuple[str, str, str]] = []
    small, unseen = split == "small", split == "unseen"
    wanted = 1 if small else rng.choices((1, 2, 3), weights=config.objects)[0]
    while len(combinations) < wanted:
        candidate = rng.choice(sorted(held_out)) if unseen else _combination(config.typical, rng)
        new_kind = candidate[0] not in [kind for kind, *_ in combinations]
        if new_kind and (candidate in held_out) == unseen:
            combinations.append(candidate)
    things = _placed(combinations, config.scale * (0.5**0.5 if small else 1.0), rng)
    ground = rng.choice(tuple(GROUNDS)[: config.grounds])
    said: dict[str, None] = {}
    captions = tuple(caption(things, ground, config.detail, rng, said) for _ in range(2))
    return Scene(ground, things, captions, tuple(said), rng.getrandbits(32))


def held_out_combinations(seed: int) -> frozenset[tuple[str, str, str]]:
    """(kind, pattern, colour) that never occur in training or in ``val``."""
    every = [(kind, pattern, colour) for kind in KINDS for pattern in PATTERNS for colour in COLOURS]
    return frozenset(random.Random(f"{seed}/held out").sample(every, int(HELD_OUT * len(every))))


def _combination(typical: float, rng: random.Random) -> tuple[str, str, str]:
    """A kind with a pattern and a colour: its own with probability `typical` each, else any."""
    kind, patterns, colours = rng.choice(KINDS), tuple(PATTERNS), tuple(COLOURS)
    number = KINDS.index(kind)
    # Each kind has two typical colours and one typical pattern, spread so that no two kinds share all of them.
    own_colour = colours[(5 * number + rng.choice((0, 3))) % len(colours)]
    own_pattern = patterns[(number + 3 * (number // len(colours))) % len(patterns)]
    colour = own_colour if rng.random() < typical else rng.choice(colours)
    pattern = own_pattern if rng.random() < typical else rng.choice(patterns)
    return kind, pattern, colour


def _placed(combinations: Sequence[tuple[str, str, str]], scale: float, rng: random.Random) -> tuple[Thing, ...]:
    """Objects at random places inside the picture, overlapping a little at most."""
    # By number of objects: least and largest size as shares of the side, and the largest that leaves room for others.
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
