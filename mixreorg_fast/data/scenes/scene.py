"""What a scene shows: objects of some kind, pattern and colour on a ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """An outline: polygons painted one after the other, filled (True) or cut out (False).

    `swing`: how far it may be turned either way, in degrees, and keep its name.
    """

    parts: tuple[tuple[np.ndarray, bool], ...]
    swing: float


def _ellipse(rx: float = 1.0, ry: float | None = None, x: float = 0.0, y: float = 0.0, points: int = 40) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + (rx if ry is None else ry) * np.sin(t)], axis=1)


def _regular(corners: int, first: float = -90.0) -> np.ndarray:
    t = np.radians(first) + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 17


def _drop() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([0.72 * np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)], axis=1)


def _polygon(*points: float) -> np.ndarray:
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return _polygon(left, top, right, top, right, bottom, left, bottom)


def _shape(swing: float, *parts: np.ndarray, holes: Sequence[np.ndarray] = ()) -> Shape:
    """A shape of the union of `parts` less `holes`, moved and scaled so that its longer side is 1."""
    points = np.concatenate(parts)
    low, high = points.min(axis=0), points.max(axis=0)
    middle, scale = (low + high) / 2, (high - low).max()
    every = [(part, True) for part in parts] + [(hole, False) for hole in holes]
    return Shape(tuple(((part - middle) / scale, filled) for part, filled in every), swing)


# Chosen to be told apart at 16 px.
SHAPES: dict[str, Shape] = {
    "circle": _shape(180, _ellipse()),
    "square": _shape(12, _box(-1, -1, 1, 1)),
    "triangle": _shape(15, _polygon(0, -1, 1.05, 0.8, -1.05, 0.8)),
    "star": _shape(36, _regular(10) * np.tile([[1], [0.42]], (5, 1))),
    "heart": _shape(25, _heart()),
    "cross": _shape(20, _box(-0.36, -1, 0.36, 1), _box(-1, -0.36, 1, 0.36)),
    "crescent": _shape(40, _ellipse(points=64), holes=[_ellipse(0.82, x=0.5, points=64)]),
    "ring": _shape(180, _ellipse(points=56), holes=[_ellipse(0.5)]),
    "arrow": _shape(180, _polygon(-1, -0.26, 0.1, -0.26, 0.1, -0.72, 1, 0, 0.1, 0.72, 0.1, 0.26, -1, 0.26)),
    "hexagon": _shape(30, _regular(6)),
    "diamond": _shape(12, _polygon(0, -1, 0.6, 0, 0, 1, -0.6, 0)),
    "oval": _shape(60, _ellipse(1, 0.52)),
    "drop": _shape(25, _drop()),
    "bolt": _shape(15, _polygon(0.2, -1, -0.55, 0.15, -0.08, 0.15, -0.25, 1, 0.58, -0.25, 0.1, -0.25, 0.5, -1)),
    "house": _shape(
        8, _box(-0.75, -0.1, 0.75, 0.95), _polygon(0, -1, 1, -0.1, -1, -0.1), holes=[_box(-0.2, 0.3, 0.2, 0.96)]
    ),
    "fish": _shape(25, _ellipse(0.72, 0.46, x=0.28), _polygon(-0.25, 0, -1, -0.5, -0.8, 0, -1, 0.5)),
    "flower": _shape(
        36, *(_ellipse(0.4, x=0.6 * x, y=0.6 * y) for x, y in _regular(5)), _ellipse(0.4), holes=[_ellipse(0.2)]
    ),
    "cloud": _shape(
        8,
        _ellipse(0.4, x=-0.55, y=0.1),
        _ellipse(0.52, x=0.0, y=-0.15),
        _ellipse(0.38, x=0.55, y=0.12),
        _box(-0.55, 0.1, 0.55, 0.5),
    ),
    "mushroom": _shape(
        15, np.concatenate([_ellipse(1, 0.9, points=48)[24:], _polygon(1, 0)]), _box(-0.28, -0.1, 0.28, 0.85)
    ),
    "tree": _shape(
        8,
        _polygon(0, -1, 0.5, -0.35, -0.5, -0.35),
        _polygon(0, -0.65, 0.65, 0.15, -0.65, 0.15),
        _polygon(0, -0.2, 0.8, 0.65, -0.8, 0.65),
        _box(-0.16, 0.6, 0.16, 1),
    ),
    "frame": _shape(12, _box(-1, -0.85, 1, 0.85), holes=[_box(-0.58, -0.45, 0.58, 0.45)]),
    "bow": _shape(20, _polygon(0, 0, -1, -0.65, -1, 0.65), _polygon(0, 0, 1, -0.65, 1, 0.65), _ellipse(0.24)),
    "boat": _shape(
        10,
        _polygon(-1, 0.4, 1, 0.4, 0.62, 0.95, -0.62, 0.95),
        _polygon(0.02, -1, 0.02, 0.25, 0.8, 0.25),
        _box(-0.1, -1, 0.04, 0.45),
    ),
    "key": _shape(
        60,
        _ellipse(0.46, x=-0.55),
        _box(-0.2, -0.14, 1, 0.14),
        _box(0.78, 0, 1, 0.46),
        _box(0.4, 0, 0.6, 0.4),
        holes=[_ellipse(0.2, x=-0.55)],
    ),
}
KINDS = tuple(SHAPES)  # of objects: the classes of evaluation
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


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y`: its middle; `size`: its longer side; all as shares of the picture's side."""

    kind: str
    pattern: str
    colour: str
    x: float
    y: float
    size: float
    angle: float  # degrees
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """One to three objects on a ground, with captions."""

    ground: str
    things: tuple[Thing, ...]  # painted in this order
    captions: tuple[str, ...]
    nouns: tuple[str, ...]  # kinds and ground that the captions mention
    picture_seed: int
