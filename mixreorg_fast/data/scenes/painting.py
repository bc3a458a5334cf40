"""Painting a scene: its picture and its mask.

Everything is painted at twice the picture's size and then averaged, which smooths the edges of the picture. A pixel of
the mask belongs to an object that covers at least half of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .grounds import GROUNDS
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


class Painter:
    """Paints scenes of one picture size; its textures depend on (size, seed) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self._side = OVERSAMPLING * size
        self._size = size
        # Two pictures' width of each texture, so that windows of it rarely coincide.
        rng = np.random.default_rng(seed)
        self._textures = {
            name: [ground.draw(rng, 2 * self._side) for _ in range(TEXTURES_PER_GROUND)]
            for name, ground in GROUNDS.items()
        }

    def paint(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 ``[size, size, 3]``, and its mask, uint8 ``[size, size]``: 0 ground, k the k-th kind."""
        rng = random.Random(scene.picture_seed)
        canvas = self._ground(scene, rng)
        labels = np.zeros((self._side, self._side), np.uint8)
        for thing in scene.things:
            self._paint_thing(canvas, labels, thing, rng)
        picture = np.asarray(Image.fromarray(canvas).reduce(OVERSAMPLING))
        # The third of the four labels in order is not the ground's 0 where objects cover at least half of the pixel.
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
        families = list(GROUNDS[scene.ground].families)
        rng.shuffle(families)
        # The first family whose middle is no object's colour, so that objects stand out; the last if none is.
        for dark, light in families:
            middle = (dark + light) / 2
            if all(np.abs(middle - COLOURS[thing.colour]).sum() > 110 for thing in scene.things):
                break
        shift = np.array([rng.gauss(0, 7) for _ in range(3)]) + rng.gauss(0, 9)
        dark, light = dark + shift, light + shift
        shades = np.clip(dark + np.linspace(0, 1, 256)[:, None] * (light - dark), 0, 255).astype(np.uint8)
        return shades.take(window, axis=0)

    def _paint_thing(self, canvas: np.ndarray, labels: np.ndarray, thing: Thing, rng: random.Random) -> None:
        length = thing.size * self._side
        middle = np.array([thing.x, thing.y]) * self._side
        matrix = _turn(thing.angle) * length
        if thing.mirrored:
            matrix = np.array([[-1.0], [1.0]]) * matrix
        shape = SHAPES[thing.kind]
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
        np.copyto(labels[area], np.uint8(KINDS.index(thing.kind) + 1), where=covered)

    def _surface(
        self, thing: Thing, shape: tuple[int, ...], corner: tuple[int, int], middle: np.ndarray, rng: random.Random
    ) -> np.ndarray:
        """Colours of an object over its box, fp32 ``[h, w, 3]``: patterned, lit from one side."""
        colour = np.array(COLOURS[thing.colour], np.float32) + [rng.gauss(0, 6) for _ in range(3)]
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


def _turn(angle: float) -> np.ndarray:
    """The matrix that turns row vectors by `angle` degrees."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[c, s], [-s, c]])
