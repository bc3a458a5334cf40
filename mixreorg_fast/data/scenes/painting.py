"""Painting a scene: its picture and its mask.

Everything is painted at twice the picture's size and then averaged, which smooths the edges of the picture. A pixel of
the mask belongs to an object that covers at least half of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scene import COLOURS, KINDS, SHAPES, Scene, Thing

OVERSAMPLING = 2  # the mask's rule below is written for it
TEXTURES_PER_GROUND = 6

# Where the second colour shows, from coordinates turned with the pattern; one unit is one repeat.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray] | None] = {
    "plain": None,
    "striped": lambda u, v: u % 1 < 0.42,
    "dotted": lambda u, v: np.hypot((u + 0.5 * (np.floor(v) % 2)) % 1 - 0.5, v - np.floor(v) - 0.5) < 0.31,
    "checked": lambda u, v: (np.floor(1.5 * u) + np.floor(1.5 * v)) % 2 < 1,
    "grid": lambda u, v: (u % 1 < 0.24) | (v % 1 < 0.24),
    "two-tone": lambda u, v: v > 0,
}


class Canvas:
    """A square to fill with a texture in about -1 … 1, and its pixels' coordinates `x` and `y`, fp32 ``[side, side]``
    each; lengths are in units of side / 32."""

    def __init__(self, rng: np.random.Generator, side: int) -> None:
        self.rng, self.side, self.unit = rng, side, side / 32
        self.y, self.x = np.mgrid[:side, :side].astype(np.float32) / self.unit

    def filled(self, texture: Callable[[Canvas], np.ndarray]) -> np.ndarray:
        """The texture, uint8 ``[side, side]``."""
        return np.clip(127.5 * (texture(self) + 1), 0, 255).astype(np.uint8)

    def noise(self, across: float, down: float, unit: float | None = None) -> np.ndarray:
        """Smooth noise in about -1 … 1 with grains `across` x `down` large, in the canvas's units or `unit` pixels."""
        unit = unit or self.unit
        shape = (max(2, int(self.side / (unit * down))), max(2, int(self.side / (unit * across))))
        coarse = Image.fromarray(self.rng.standard_normal(shape).astype(np.float32))
        fine = np.asarray(coarse.resize((self.side, self.side), Image.Resampling.BICUBIC))
        return np.clip(fine / 1.6, -1.2, 1.2)

    def shades(self, low: float, high: float, *shape: int) -> np.ndarray:
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def joints(self, width: float, height: float, shift: float, joint: float) -> np.ndarray:
        """True on the joints between bricks or tiles."""
        row = np.floor(self.y / height)
        return ((self.y % height) < joint) | (((self.x + shift * row * width) % width) < joint)

    def cells(self, size: float) -> tuple[np.ndarray, np.ndarray]:
        """Random cells of about `size`: distance to the nearest centre (in sizes), and the cell's shade."""
        count = max(2, int(self.side / (self.unit * size)))
        y, x = np.mgrid[: self.side, : self.side].astype(np.float32) / (self.side / count)
        jitter, shades = self.shades(0.1, 0.9, 2, count + 2, count + 2), self.shades(-0.8, 0.6, count + 2, count + 2)
        nearest, shade = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, np.float32)
        for dy, dx in np.ndindex(3, 3):
            row, column = np.floor(y).astype(int) + dy, np.floor(x).astype(int) + dx
            distance = np.hypot(row - 1 + jitter[0, row, column] - y, column - 1 + jitter[1, row, column] - x)
            closer = distance < nearest
            nearest, shade = np.where(closer, distance, nearest), np.where(closer, shades[row, column], shade)
        return nearest, shade


def _brick(c: Canvas) -> np.ndarray:
    shades = c.shades(-0.5, 0.4, c.side, c.side)
    row = np.floor(c.y / 1.2).astype(int)
    column = np.floor((c.x + 1.3 * (row % 2)) / 2.6).astype(int)
    return np.where(c.joints(2.6, 1.2, 0.5, 0.22), 1.0, shades[row, column] - 0.1) + 0.2 * c.noise(2, 2, unit=1)


def _wood(c: Canvas) -> np.ndarray:
    planks = c.shades(-0.35, 0.35, c.side + 1)[np.floor(c.y / 2.2).astype(int)]
    grain = np.sin(9 * c.y + 3 * c.noise(8, 1.2))
    return np.where((c.y % 2.2) < 0.16, -1.1, planks + 0.3 * grain) + 0.15 * c.noise(2, 0.15)


def _gravel(c: Canvas) -> np.ndarray:
    distance, shade = c.cells(1.1)
    return np.where(distance > 0.62, -1.2, shade + 0.5 - distance)


def _tiles(c: Canvas) -> np.ndarray:
    shades = c.shades(-0.15, 0.3, c.side, c.side)
    tile = np.floor(c.y / 2.4).astype(int), np.floor(c.x / 2.4).astype(int)
    return np.where(c.joints(2.4, 2.4, 0, 0.2), -1.1, shades[tile])


def _leaves(c: Canvas) -> np.ndarray:
    distance, shade = c.cells(1.9)
    return 1.1 * shade - 0.7 * distance + 0.3 - 0.3 * (np.abs(c.noise(0.8, 0.8)) < 0.12)


def _cloth(c: Canvas) -> np.ndarray:
    weave = np.where((np.floor(2 * c.x) + np.floor(2 * c.y)) % 2 == 0, np.sin(12.6 * c.x), np.sin(12.6 * c.y))
    return 0.6 * weave + 0.2 * c.noise(2, 2)


# A texture, and families of two colours, dark and light, that every picture of the ground draws from.
GROUNDS: dict[str, tuple[Callable[[Canvas], np.ndarray], tuple[str, ...]]] = {
    "grass": (
        lambda c: 0.7 * c.noise(0.25, 1.6) + 0.4 * c.noise(3, 3),
        ("26541e 70a448", "466022 9eb05c", "18462c 548c5a"),
    ),
    "sand": (
        lambda c: 0.45 * np.sin(2.2 * c.y + 0.5 * c.x + 1.5 * c.noise(6, 6)) + 0.5 * c.noise(0.2, 0.2),
        ("b09260 e2ca98", "c4ac80 f0e2be", "a07652 d4aa7e"),
    ),
    "water": (
        lambda c: 0.7 * np.sin(3.5 * c.y + 2.5 * c.noise(4, 1.5)) + 0.3 * c.noise(3, 0.5),
        ("184a7a 64a0c6", "1e606e 78bec4", "22385c 607ea4"),
    ),
    "brick": (_brick, ("783428 cebcac", "705c52 d6d0c8", "925438 dcccb4")),
    "snow": (
        lambda c: 0.7 * c.noise(5, 3) + 0.15 * c.noise(0.2, 0.2),
        ("c4d0e0 fafcff", "ceced4 fcfaf8", "b4c4d8 ecf4fc"),
    ),
    "wood": (_wood, ("5c3c22 a87a4e", "967046 d8b482", "60564e a89c90")),
    "gravel": (_gravel, ("424244 b0aeaa", "544a40 baac9a", "3a404a 9aa4b0")),
    "tiles": (_tiles, ("828c92 e2e8ea", "608296 b4d4e4", "80543e ce9676")),
    "mud": (
        lambda c: 0.6 * c.noise(1.2, 1.0) + 0.5 * c.noise(0.35, 0.35),
        ("3a2a1c 765a40", "4a3a2e 8a7460", "302822 685c4e"),
    ),
    "leaves": (_leaves, ("284c1e 829e4a", "783e16 d88e42", "62521e c4b058")),
    "sky": (
        lambda c: np.clip(1.6 * (c.noise(4, 2) + 0.5 * c.noise(1.5, 1)) - 0.5, -0.3, 1.2),
        ("5c98d8 f6f8fa", "8ea4bc e8eaec", "be8c96 fae0ce"),
    ),
    "cloth": (_cloth, ("5c3c60 a884a8", "74282c ba6862", "545c68 9ca4b0")),
}


class Painter:
    """Paints scenes of one picture size; its textures depend on (size, seed) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self._side = OVERSAMPLING * size
        # Each texture is two pictures wide, so that windows rarely coincide.
        rng = np.random.default_rng(seed)
        self._textures = {
            name: [Canvas(rng, 2 * self._side).filled(texture) for _ in range(TEXTURES_PER_GROUND)]
            for name, (texture, _) in GROUNDS.items()
        }

    def paint(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 ``[size, size, 3]``, and its mask, uint8 ``[size, size]``: 0 ground, k the k-th kind."""
        rng = random.Random(scene.picture_seed)
        canvas = self._ground(scene, rng)
        labels = np.zeros((self._side, self._side), np.uint8)
        for thing in scene.things:
            self._paint_thing(canvas, labels, thing, rng)
        picture = np.asarray(Image.fromarray(canvas).reduce(OVERSAMPLING))
        # Of the four labels, sorted upwards, the third is not the ground's 0 if objects cover at least two of the four.
        a, b, c, d = (labels[row::2, column::2] for row in (0, 1) for column in (0, 1))
        low, high = np.maximum(np.minimum(a, b), np.minimum(c, d)), np.minimum(np.maximum(a, b), np.maximum(c, d))
        return picture, np.maximum(low, high)

    def _ground(self, scene: Scene, rng: random.Random) -> np.ndarray:
        """A window of one of the ground's textures in colours near one of its families, uint8 ``[side, side, 3]``."""
        texture = rng.choice(self._textures[scene.ground])
        top, left = rng.randrange(self._side), rng.randrange(self._side)
        window = texture[top : top + self._side, left : left + self._side]
        if rng.random() < 0.5:
            window = window[:, ::-1]
        families = [np.array(list(bytes.fromhex(family))).reshape(2, 3) for family in GROUNDS[scene.ground][1]]
        rng.shuffle(families)
        # The first family whose middle is far from every object's colour, so that objects stand out; else the last.
        for dark, light in families:
            middle = (dark + light) / 2
            if all(np.abs(middle - COLOURS[thing.colour]).sum() > 110 for thing in scene.things):
                break
        shift = np.array([rng.gauss(0, 7) for _ in range(3)]) + rng.gauss(0, 9)
        dark, light = dark + shift, light + shift
        shades = np.clip(dark + np.linspace(0, 1, 256)[:, None] * (light - dark), 0, 255).astype(np.uint8)
        return shades.take(window, axis=0)

    def _paint_thing(self, canvas: np.ndarray, labels: np.ndarray, thing: Thing, rng: random.Random) -> None:
        middle = np.array([thing.x, thing.y]) * self._side
        matrix = _turn(thing.angle) * (thing.size * self._side)
        if thing.mirrored:
            matrix = np.array([[-1.0], [1.0]]) * matrix
        outlines = [(points @ matrix + middle, filled) for points, filled in SHAPES[thing.kind].parts]
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
        np.copyto(labels[area], np.uint8(KINDS.index(thing.kind) + 1), where=covered)

    def _surface(
        self, thing: Thing, shape: tuple[int, ...], corner: tuple[int, int], middle: np.ndarray, rng: random.Random
    ) -> np.ndarray:
        """Colours of an object over its box, fp32 ``[h, w, 3]``: patterned, lit from one side."""
        colour = (np.array(COLOURS[thing.colour]) + [rng.gauss(0, 6) for _ in range(3)]).astype(np.float32)
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


def _turn(angle: float) -> np.ndarray:
    """The matrix that turns row vectors by `angle` degrees."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[c, s], [-s, c]])
