"""What a scene shows and says."""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import SHAPES

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
