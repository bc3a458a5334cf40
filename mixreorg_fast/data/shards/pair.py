"""A photo with its captions, to be written to a shard, and the checks that every kind of source makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, nearest
from .bad import Bad
from .captions import captions_of
from .scan import LARGEST_MEMBER

# Names of columns, in any case.
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "title", "comment")


@dataclass(frozen=True)
class Pair:
    """A sample to be written: an encoded photo with its captions and, optionally, further fields."""

    key: str
    image: bytes
    extension: str
    captions: Sequence[str]
    fields: dict | None = None  # the sample's .json


def checked(source: str | Path, key: str, image: bytes, text: bytes) -> Pair | Bad:
    """The sample of an encoded photo and its captions, one per line; or what is wrong with it."""
    extension = image_extension(image)
    if extension is None:
        return Bad(str(source), key, "not a JPEG, PNG or WebP image")
    if len(image) > LARGEST_MEMBER:
        return Bad(str(source), key, f"{len(image)} bytes, more than {LARGEST_MEMBER}")
    try:
        return Pair(key, image, extension, captions_of(text))
    except ValueError as error:
        return Bad(str(source), key, str(error))


def image_extension(image: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` by a photo's first bytes, None for anything else."""
    if image[:3] == b"\xff\xd8\xff":
        return "jpg"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None


def find_column(file: Path, what: str, asked: str | None, usual: Sequence[str], there: Sequence[str]) -> str:
    """The column of a table that is `asked` for, else the first of the `usual` names, in any case.

    Raises:
        UserError: no column of `there` fits; `what` names the column and its option.
    """
    if asked is not None:
        if asked not in there:
            raise UserError(f"{file}: no column '{asked}'{nearest(asked, there)}")
        return asked
    for name in usual:
        for column in there:
            if column.lower() == name:
                return column
    raise UserError(
        f"{file}: which column is the {what}? name it with --{what}-column (there are: {', '.join(there)}); "
        f"usual names are {', '.join(usual)}"
    )
