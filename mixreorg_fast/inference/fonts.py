"""Text in pictures: fonts that have its characters, and lines that fit.

Pillow's own font has ASCII only. Other characters take a font of matplotlib or the system (DejaVu Sans: Latin, Greek,
Cyrillic; others through fontconfig). A character that no font has is written in ASCII: é as e, 猫 as ``\\u732b``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import subprocess
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont

# Found by Pillow in the folders of Linux, macOS and Windows.
SYSTEM = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")
CHECKED = 24  # pixels, the size at which a font is asked for a character


class Face(NamedTuple):
    """A font in a file; without a path, Pillow's own."""

    path: str | None = None
    index: int = 0


OWN = Face()


class Run(NamedTuple):
    """Characters that one font draws."""

    text: str
    font: ImageFont.FreeTypeFont


def runs(text: str, size: int) -> list[Run]:
    """`text` in runs of one font each, `size` pixels high; a single run if one font has all characters."""
    if text.isascii():
        return [Run(text, _load(OWN, size))]
    text = drawable(text)
    solid = [character for character in text if not character.isspace()]
    for face in faces():
        if all(has_glyph(face, character) for character in solid):
            return [Run(text, _load(face, size))]
    grouped = itertools.groupby(text, key=lambda character: _face_of(character) or OWN)
    return [Run("".join(characters), _load(face, size)) for face, characters in grouped]


def drawable(text: str) -> str:
    """`text` without invisible characters, and with ASCII in place of those that no font has."""

    def ascii_of(character: str) -> str:
        base = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
        if base != [character] and all(map(_face_of, base)):
            return "".join(base)
        return character.encode("ascii", "backslashreplace").decode()

    text = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(c if c.isspace() or _face_of(c) else ascii_of(c) for c in text)


def length(text: str, size: int) -> float:
    """Width of `text` in pixels."""
    return sum(run.font.getlength(run.text) for run in runs(text, size))


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: tuple) -> None:
    """Draw `text`; `place`: the left end of its baseline."""
    x, y = place
    for run in runs(text, size):
        draw.text((x, y), run.text, font=run.font, fill=fill, anchor="ls")
        x += run.font.getlength(run.text)


def wrap(text: str, size: int, width: float) -> list[str]:
    """`text` in lines of at most `width` pixels, broken between words; a word longer than a line is broken inside."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if length(longer, size) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in drawable(word):
            if lines[-1] and length(lines[-1] + character, size) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line] or [""]


@functools.cache
def faces() -> list[Face]:
    """The fonts in the order of preference; :func:`_face_of` adds those that it finds."""
    found = [OWN]
    if (matplotlib := importlib.util.find_spec("matplotlib")) and matplotlib.origin:
        path = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        found += [Face(str(path))] if path.is_file() else []
    for name in SYSTEM:
        with contextlib.suppress(OSError):
            found.append(Face(str(ImageFont.truetype(name, CHECKED).path)))
    return found


@functools.lru_cache(65536)
def has_glyph(face: Face, character: str) -> bool:
    """Whether `face` has a glyph for `character`: neither empty nor the box for missing characters."""
    drawn, missing = (_load(face, CHECKED).getmask(each) for each in (character, "\uffff"))
    return bool(bytes(drawn)) and (bytes(drawn), drawn.size) != (bytes(missing), missing.size)


@functools.lru_cache(65536)
def _face_of(character: str) -> Face | None:
    """The first font that has `character`; None: no font has it."""
    for face in faces():
        if has_glyph(face, character):
            return face
    with contextlib.suppress(OSError):  # a bitmap font lacks this size
        if (face := _ask_fontconfig(character)) and has_glyph(face, character):
            faces().append(face)
            return face
    return None


def _ask_fontconfig(character: str) -> Face | None:
    """What fontconfig would draw `character` with, which may lack it."""
    command = ["fc-match", "--format", "%{file}\n%{index}", f"sans:charset={ord(character):x}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        path, index = done.stdout.splitlines()
        return Face(path, int(index))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


@functools.lru_cache(256)
def _load(face: Face, size: int) -> Any:  # Pillow's FreeTypeFont
    return ImageFont.load_default(size) if face.path is None else ImageFont.truetype(face.path, size, face.index)
