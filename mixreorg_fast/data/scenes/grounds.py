"""The textures and colours of the grounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image


class Canvas:
    """A square to fill with a texture in about -1 … 1, fp32 ``[side, side]``; lengths are in units of side / 32.

    Attributes:
        x, y: coordinates of the pixels, fp32 ``[side, side]``.
    """

    def __init__(self, rng: np.random.Generator, side: int) -> None:
        self.rng, self.side, self.unit = rng, side, side / 32
        line = np.arange(side, dtype=np.float32) / self.unit
        self.x, self.y = np.broadcast_to(line, (side, side)), np.broadcast_to(line[:, None], (side, side))

    def noise(self, across: float, down: float) -> np.ndarray:
        """Smooth noise in about -1 … 1 with grains `across` x `down` large."""
        return self.noise_of(self.unit * across, self.unit * down)

    def noise_of(self, across: float, down: float) -> np.ndarray:
        """As :meth:`noise`, with grains in pixels."""
        shape = (max(2, int(self.side / down)), max(2, int(self.side / across)))
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
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                row, column = np.floor(y).astype(int) + dy + 1, np.floor(x).astype(int) + dx + 1
                distance = np.hypot(row - 1 + jitter[0, row, column] - y, column - 1 + jitter[1, row, column] - x)
                closer = distance < nearest
                nearest, shade = np.where(closer, distance, nearest), np.where(closer, shades[row, column], shade)
        return nearest, shade


def _grass(c: Canvas) -> np.ndarray:
    return 0.7 * c.noise(0.25, 1.6) + 0.4 * c.noise(3, 3)


def _sand(c: Canvas) -> np.ndarray:
    return 0.45 * np.sin(2.2 * c.y + 0.5 * c.x + 1.5 * c.noise(6, 6)) + 0.5 * c.noise(0.2, 0.2)


def _water(c: Canvas) -> np.ndarray:
    return 0.7 * np.sin(3.5 * c.y + 2.5 * c.noise(4, 1.5)) + 0.3 * c.noise(3, 0.5)


def _brick(c: Canvas) -> np.ndarray:
    shades = c.shades(-0.5, 0.4, c.side, c.side)
    row = np.floor(c.y / 1.2).astype(int)
    column = np.floor((c.x + 1.3 * (row % 2)) / 2.6).astype(int)
    return np.where(c.joints(2.6, 1.2, 0.5, 0.22), 1.0, shades[row, column] - 0.1) + 0.2 * c.noise_of(2, 2)


def _snow(c: Canvas) -> np.ndarray:
    return 0.7 * c.noise(5, 3) + 0.15 * c.noise(0.2, 0.2)


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


def _mud(c: Canvas) -> np.ndarray:
    return 0.6 * c.noise(1.2, 1.0) + 0.5 * c.noise(0.35, 0.35)


def _leaves(c: Canvas) -> np.ndarray:
    distance, shade = c.cells(1.9)
    return 1.1 * shade - 0.7 * distance + 0.3 - 0.3 * (np.abs(c.noise(0.8, 0.8)) < 0.12)


def _sky(c: Canvas) -> np.ndarray:
    return np.clip(1.6 * (c.noise(4, 2) + 0.5 * c.noise(1.5, 1)) - 0.5, -0.3, 1.2)


def _cloth(c: Canvas) -> np.ndarray:
    weave = np.where((np.floor(2 * c.x) + np.floor(2 * c.y)) % 2 == 0, np.sin(12.6 * c.x), np.sin(12.6 * c.y))
    return 0.6 * weave + 0.2 * c.noise(2, 2)


class Ground:
    """A texture, and families of two colours that every picture of it draws from.

    Args:
        texture: fills a canvas.
        families: dark and light, such as "26541e 70a448"; as an attribute RGB, ``[2, 3]`` each.
    """

    def __init__(self, texture: Callable[[Canvas], np.ndarray], *families: str) -> None:
        self._texture = texture
        self.families = [np.array(list(bytes.fromhex(family))).reshape(2, 3) for family in families]

    def draw(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """The texture, uint8 ``[side, side]``."""
        return np.clip(127.5 * (self._texture(Canvas(rng, side)) + 1), 0, 255).astype(np.uint8)


GROUNDS = {
    "grass": Ground(_grass, "26541e 70a448", "466022 9eb05c", "18462c 548c5a"),
    "sand": Ground(_sand, "b09260 e2ca98", "c4ac80 f0e2be", "a07652 d4aa7e"),
    "water": Ground(_water, "184a7a 64a0c6", "1e606e 78bec4", "22385c 607ea4"),
    "brick": Ground(_brick, "783428 cebcac", "705c52 d6d0c8", "925438 dcccb4"),
    "snow": Ground(_snow, "c4d0e0 fafcff", "ceced4 fcfaf8", "b4c4d8 ecf4fc"),
    "wood": Ground(_wood, "5c3c22 a87a4e", "967046 d8b482", "60564e a89c90"),
    "gravel": Ground(_gravel, "424244 b0aeaa", "544a40 baac9a", "3a404a 9aa4b0"),
    "tiles": Ground(_tiles, "828c92 e2e8ea", "608296 b4d4e4", "80543e ce9676"),
    "mud": Ground(_mud, "3a2a1c 765a40", "4a3a2e 8a7460", "302822 685c4e"),
    "leaves": Ground(_leaves, "284c1e 829e4a", "783e16 d88e42", "62521e c4b058"),
    "sky": Ground(_sky, "5c98d8 f6f8fa", "8ea4bc e8eaec", "be8c96 fae0ce"),
    "cloth": Ground(_cloth, "5c3c60 a884a8", "74282c ba6862", "545c68 9ca4b0"),
}
