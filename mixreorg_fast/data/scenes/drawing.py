"""How the embedded scenes are drawn: outlines of the kinds, patterns, and textures of the grounds.

Everything is painted at twice the picture's size and then averaged, which smooths the edges of the picture; a pixel of
the mask belongs to an object where that covers at least half of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OVERSAMPLING = 2  # the mask's rule below is written for it
TEXTURES_PER_GROUND = 6


@dataclass(frozen=True)
class Shape:
    """An outline: polygons painted one after the other, filled (True) or cut out (False).

    `swing`: how far it may be turned either way, in degrees, and still be what it is called.
    """

    parts: tuple[tuple[np.ndarray, bool], ...]
    swing: float


@dataclass(frozen=True)
class Placed:
    """An object to paint; lengths are shares of the picture's side."""

    label: int
    shape: str
    pattern: str
    colour: tuple[int, int, int]
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool


def _turn(angle: float) -> np.ndarray:
    """The matrix that turns row vectors by `angle` degrees."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[c, s], [-s, c]])


def _ellipse(rx: float = 1.0, ry: float | None = None, x: float = 0.0, y: float = 0.0, points: int = 40) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + (rx if ry is None else ry) * np.sin(t)], axis=1)


def _regular(corners: int, first: float = -90.0) -> np.ndarray:
    t = np.radians(first) + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    return _regular(2 * points) * np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]


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
    "star": _shape(36, _star(5, 0.42)),
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


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u % 1) < 0.42


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v)
    return np.hypot((u + 0.5 * (row % 2)) % 1 - 0.5, v - row - 0.5) < 0.31


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.floor(1.5 * u) + np.floor(1.5 * v)) % 2 < 1


def _grid(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ((u % 1) < 0.24) | ((v % 1) < 0.24)


def _two_tone(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return v > 0


# Where the second colour shows, from coordinates turned with the pattern; one unit is one repeat.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray] | None] = {
    "plain": None,
    "striped": _stripes,
    "dotted": _dots,
    "checked": _checks,
    "grid": _grid,
    "two-tone": _two_tone,
}


def _noise(rng: np.random.Generator, side: int, across: float, down: float) -> np.ndarray:
    """Smooth noise in about -1 … 1, fp32 ``[side, side]``, with grains `across` x `down` pixels large."""
    shape = (max(2, int(side / down)), max(2, int(side / across)))
    coarse = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
    fine = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(fine / 1.6, -1.2, 1.2)


def _levels(texture: np.ndarray) -> np.ndarray:
    """-1 … 1 to 0 … 255, uint8."""
    return np.clip(127.5 * (texture + 1), 0, 255).astype(np.uint8)


def _coordinates(side: int, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y ``[side, side]`` in units of `unit` pixels."""
    line = np.arange(side, dtype=np.float32) / unit
    return np.broadcast_to(line, (side, side)), np.broadcast_to(line[:, None], (side, side))


def _grass(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    return 0.7 * _noise(rng, side, unit * 0.25, unit * 1.6) + 0.4 * _noise(rng, side, unit * 3, unit * 3)


def _sand(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    x, y = _coordinates(side, unit)
    ripples = np.sin(2.2 * y + 0.5 * x + 1.5 * _noise(rng, side, unit * 6, unit * 6))
    return 0.45 * ripples + 0.5 * _noise(rng, side, unit * 0.2, unit * 0.2)


def _water(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    _, y = _coordinates(side, unit)
    waves = np.sin(3.5 * y + 2.5 * _noise(rng, side, unit * 4, unit * 1.5))
    return 0.7 * waves + 0.3 * _noise(rng, side, unit * 3, unit * 0.5)


def _joints(x: np.ndarray, y: np.ndarray, width: float, height: float, shift: float, joint: float) -> np.ndarray:
    """True on the joints between bricks or planks."""
    row = np.floor(y / height)
    return ((y % height) < joint) | (((x + shift * row * width) % width) < joint)


def _brick(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    x, y = _coordinates(side, unit)
    shades = rng.uniform(-0.5, 0.4, (side, side)).astype(np.float32)
    row = np.floor(y / 1.2).astype(int)
    column = np.floor((x + 1.3 * (row % 2)) / 2.6).astype(int)
    return np.where(_joints(x, y, 2.6, 1.2, 0.5, 0.22), 1.0, shades[row, column] - 0.1) + 0.2 * _noise(rng, side, 2, 2)


def _snow(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    return 0.7 * _noise(rng, side, unit * 5, unit * 3) + 0.15 * _noise(rng, side, unit * 0.2, unit * 0.2)


def _wood(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    x, y = _coordinates(side, unit)
    shades = rng.uniform(-0.35, 0.35, side + 1).astype(np.float32)
    planks = shades[np.floor(y / 2.2).astype(int)]
    grain = np.sin(9 * y + 3 * _noise(rng, side, unit * 8, unit * 1.2))
    return np.where((y % 2.2) < 0.16, -1.1, planks + 0.3 * grain) + 0.15 * _noise(rng, side, unit * 2, unit * 0.15)


def _cells(rng: np.random.Generator, side: int, unit: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Random cells of about `size` units: distance to the nearest centre (in sizes), and the cell's shade."""
    count = max(2, int(side / (unit * size)))
    step = side / count
    y, x = np.mgrid[:side, :side].astype(np.float32) / step
    jitter = rng.uniform(0.1, 0.9, (2, count + 2, count + 2)).astype(np.float32)
    shades = rng.uniform(-0.8, 0.6, (count + 2, count + 2)).astype(np.float32)
    nearest, shade = np.full((side, side), np.inf, np.float32), np.zeros((side, side), np.float32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            row, column = np.floor(y).astype(int) + dy + 1, np.floor(x).astype(int) + dx + 1
            distance = np.hypot(row - 1 + jitter[0, row, column] - y, column - 1 + jitter[1, row, column] - x)
            closer = distance < nearest
            nearest = np.where(closer, distance, nearest)
            shade = np.where(closer, shades[row, column], shade)
    return nearest, shade


def _gravel(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    distance, shade = _cells(rng, side, unit, 1.1)
    return np.where(distance > 0.62, -1.2, shade + 0.5 - distance)


def _tiles(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    x, y = _coordinates(side, unit)
    shades = rng.uniform(-0.15, 0.3, (side, side)).astype(np.float32)
    return np.where(
        _joints(x, y, 2.4, 2.4, 0, 0.2), -1.1, shades[np.floor(y / 2.4).astype(int), np.floor(x / 2.4).astype(int)]
    )


def _mud(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    return 0.6 * _noise(rng, side, unit * 1.2, unit * 1.0) + 0.5 * _noise(rng, side, unit * 0.35, unit * 0.35)


def _leaves(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    distance, shade = _cells(rng, side, unit, 1.9)
    veins = np.abs(_noise(rng, side, unit * 0.8, unit * 0.8)) < 0.12
    return 1.1 * shade - 0.7 * distance + 0.3 - 0.3 * veins


def _sky(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    clouds = _noise(rng, side, unit * 4, unit * 2) + 0.5 * _noise(rng, side, unit * 1.5, unit * 1)
    return np.clip(1.6 * clouds - 0.5, -0.3, 1.2)


def _cloth(rng: np.random.Generator, side: int, unit: float) -> np.ndarray:
    x, y = _coordinates(side, unit)
    weave = np.where((np.floor(2 * x) + np.floor(2 * y)) % 2 == 0, np.sin(12.6 * x), np.sin(12.6 * y))
    return 0.6 * weave + 0.2 * _noise(rng, side, unit * 2, unit * 2)


@dataclass(frozen=True)
class Ground:
    """A texture in about -1 … 1, and families of (dark, light) colours that every picture of it draws from."""

    texture: Callable[[np.random.Generator, int, float], np.ndarray]
    families: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...]


GROUNDS: dict[str, Ground] = {
    "grass": Ground(
        _grass, (((38, 84, 30), (112, 164, 72)), ((70, 96, 34), (158, 176, 92)), ((24, 70, 44), (84, 140, 90)))
    ),
    "sand": Ground(
        _sand,
        (((176, 146, 96), (226, 202, 152)), ((196, 172, 128), (240, 226, 190)), ((160, 118, 82), (212, 170, 126))),
    ),
    "water": Ground(
        _water, (((24, 74, 122), (100, 160, 198)), ((30, 96, 110), (120, 190, 196)), ((34, 56, 92), (96, 126, 164)))
    ),
    "brick": Ground(
        _brick, (((120, 52, 40), (206, 188, 172)), ((112, 92, 82), (214, 208, 200)), ((146, 84, 56), (220, 204, 180)))
    ),
    "snow": Ground(
        _snow,
        (((196, 208, 224), (250, 252, 255)), ((206, 206, 212), (252, 250, 248)), ((180, 196, 216), (236, 244, 252))),
    ),
    "wood": Ground(
        _wood, (((92, 60, 34), (168, 122, 78)), ((150, 112, 70), (216, 180, 130)), ((96, 86, 78), (168, 156, 144)))
    ),
    "gravel": Ground(
        _gravel, (((66, 66, 68), (176, 174, 170)), ((84, 74, 64), (186, 172, 154)), ((58, 64, 74), (154, 164, 176)))
    ),
    "tiles": Ground(
        _tiles,
        (((130, 140, 146), (226, 232, 234)), ((96, 130, 150), (180, 212, 228)), ((128, 84, 62), (206, 150, 118))),
    ),
    "mud": Ground(_mud, (((58, 42, 28), (118, 90, 64)), ((74, 58, 46), (138, 116, 96)), ((48, 40, 34), (104, 92, 78)))),
    "leaves": Ground(
        _leaves, (((40, 76, 30), (130, 158, 74)), ((120, 62, 22), (216, 142, 66)), ((98, 82, 30), (196, 176, 88)))
    ),
    "sky": Ground(
        _sky,
        (((92, 152, 216), (246, 248, 250)), ((142, 164, 188), (232, 234, 236)), ((190, 140, 150), (250, 224, 206))),
    ),
    "cloth": Ground(
        _cloth, (((92, 60, 96), (168, 132, 168)), ((116, 40, 44), (186, 104, 98)), ((84, 92, 104), (156, 164, 176)))
    ),
}


class Painter:
    """Paints scenes of one picture size; its textures depend on (size, seed) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self._side = OVERSAMPLING * size
        self._size = size
        # Two pictures' width of each texture, so that windows of it rarely coincide.
        textures = 2 * self._side
        unit = self._side / 16  # the length textures are made of: 4 px of a 64 px picture
        rng = np.random.default_rng(seed)
        self._textures = {
            name: [_levels(ground.texture(rng, textures, unit)) for _ in range(TEXTURES_PER_GROUND)]
            for name, ground in GROUNDS.items()
        }

    def paint(self, ground: str, things: Sequence[Placed], rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 ``[size, size, 3]``, and the labels of its pixels, uint8 ``[size, size]``."""
        canvas = self._ground(ground, things, rng)
        labels = np.zeros((self._side, self._side), np.uint8)
        for thing in things:
            self._paint_thing(canvas, labels, thing, rng)
        picture = np.asarray(Image.fromarray(canvas).reduce(OVERSAMPLING))
        # Of four labels in order, the third is not the ground's 0 where objects cover half of the pixel or more.
        a, b, c, d = (labels[row::2, column::2] for row in (0, 1) for column in (0, 1))
        low, high = np.maximum(np.minimum(a, b), np.minimum(c, d)), np.minimum(np.maximum(a, b), np.maximum(c, d))
        return picture, np.maximum(low, high)

    def _ground(self, name: str, things: Sequence[Placed], rng: random.Random) -> np.ndarray:
        """A window of one of the ground's textures in colours near one of its families, uint8 ``[side, side, 3]``."""
        texture = rng.choice(self._textures[name])
        top, left = rng.randrange(self._side), rng.randrange(self._side)
        window = texture[top : top + self._side, left : left + self._side]
        if rng.random() < 0.5:
            window = window[:, ::-1]
        families = list(GROUNDS[name].families)
        rng.shuffle(families)
        # The first family whose middle is no object's colour, so that objects stand out; the last if none is.
        for dark, light in families:
            middle = (np.array(dark) + np.array(light)) / 2
            if all(np.abs(middle - thing.colour).sum() > 110 for thing in things):
                break
        shift = np.array([rng.gauss(0, 7) for _ in range(3)]) + rng.gauss(0, 9)
        dark, light = np.array(dark) + shift, np.array(light) + shift
        shades = np.clip(dark + np.linspace(0, 1, 256)[:, None] * (light - dark), 0, 255).astype(np.uint8)
        return shades.take(window, axis=0)

    def _paint_thing(self, canvas: np.ndarray, labels: np.ndarray, thing: Placed, rng: random.Random) -> None:
        length = thing.size * self._side
        middle = np.array([thing.x, thing.y]) * self._side
        matrix = _turn(thing.angle) * length
        if thing.mirrored:
            matrix = np.array([[-1.0], [1.0]]) * matrix
        shape = SHAPES[thing.shape]
        outlines = [(points @ matrix + middle, filled) for points, filled in shape.parts]
        every = np.concatenate([points for points, _ in outlines])
        left, top = np.maximum(np.floor(every.min(axis=0)).astype(int) - 2, 0)
        right, bottom = np.minimum(np.ceil(every.max(axis=0)).astype(int) + 3, self._side)
        stencil = Image.new("L", (right - left, bottom - top))
        pen = ImageDraw.Draw(stencil)
        for points, filled in outlines:
            pen.polygon([tuple(p) for p in (points - (left, top)).tolist()], fill=255 if filled else 0)
        covered = np.asarray(stencil) > 0
        inner = np.asarray(stencil.filter(ImageFilter.MinFilter(3))) > 0
        colours = self._surface(thing, covered.shape, (left, top), middle, rng)
        colours *= np.where(inner, np.float32(1), np.float32(0.55))[..., None]  # a dark rim
        area = np.s_[top:bottom, left:right]
        np.copyto(canvas[area], np.clip(colours, 0, 255).astype(np.uint8), where=covered[..., None])
        np.copyto(labels[area], np.uint8(thing.label), where=covered)

    def _surface(
        self, thing: Placed, shape: tuple[int, ...], corner: tuple[int, int], middle: np.ndarray, rng: random.Random
    ) -> np.ndarray:
        """Colours of an object over its box, fp32 ``[h, w, 3]``: patterned, lit from one side."""
        colour = np.array(thing.colour, np.float32) + [rng.gauss(0, 6) for _ in range(3)]
        colour = colour.astype(np.float32)
        y = np.arange(shape[0], dtype=np.float32)[:, None] + np.float32(corner[1] - middle[1])
        x = np.arange(shape[1], dtype=np.float32) + np.float32(corner[0] - middle[0])
        slope = 0.24 / (thing.size * self._side)
        light = 1 + (slope * rng.uniform(-1, 1)) * x + (slope * rng.uniform(-1, 1)) * y
        surface = np.broadcast_to(colour, (*shape, 3))
        pattern = PATTERNS[thing.pattern]
        if pattern is not None:
            bright = float(colour @ (0.299, 0.587, 0.114)) > 165
            second = 0.2 * colour + (8 if bright else 0.8 * 250)
            turn = _turn(rng.uniform(-90, 90) if thing.pattern in ("striped", "dotted") else rng.uniform(-20, 20))
            # Repeats of 6.5 px at 64 px, more on larger objects.
            unit = self._side * (0.07 + 0.08 * thing.size)
            across, down = (turn / unit).tolist()
            u, v = x * across[0] + y * down[0], x * across[1] + y * down[1]
            surface = np.where(pattern(u, v)[..., None], second.astype(np.float32), surface)
        return surface * light[..., None]
