"""A photo with its captions and nouns: reading the texts of a sample, checking a pair, writing pairs to a shard."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import atomic_path
from .scan import LARGEST_MEMBER, Bad

# Bytes of a line. A longer line is a document rather than a caption: text encoders read less than 1 % of it.
LONGEST_CAPTION = 8192


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
    try:
        extension = image_extension(image)
        if len(image) > LARGEST_MEMBER:
            raise ValueError(f"{len(image)} bytes, more than {LARGEST_MEMBER}")
        return Pair(key, image, extension, captions_of(text))
    except ValueError as error:
        return Bad(str(source), key, str(error))


def image_extension(image: bytes) -> str:
    """``jpg``, ``png`` or ``webp`` by a photo's first bytes; a ValueError for anything else."""
    if image[:3] == b"\xff\xd8\xff":
        return "jpg"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise ValueError("not a JPEG, PNG or WebP image")


def write_shard(path: Path, pairs: Iterable[Pair]) -> int:
    """Write one tar, which appears under its name when it is complete; returns its number of samples. Repeated keys get
    a number appended."""
    numbers: dict[str, int] = {}  # by key written: the last number appended to it
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for pair in pairs:
            key = pair.key
            while key in numbers:  # members with the same name would be taken for one sample
                numbers[pair.key] += 1
                key = f"{pair.key}-{numbers[pair.key]}"
            numbers[key] = 1
            text = "\n".join(" ".join(caption.split()) for caption in pair.captions)
            members = {pair.extension: pair.image, "txt": text.encode()}
            if pair.fields is not None:
                members["json"] = json.dumps(pair.fields, ensure_ascii=False).encode()
            for extension, data in members.items():
                # No times, owners or modes of this machine: the same samples give the same bytes.
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(numbers)


def captions_of(text: bytes) -> list[str]:
    """The captions of a ``.txt``, one per line, without lines that cannot be used; a ValueError where none is left."""
    usable, reason = [], "empty caption"
    for line in text.splitlines():
        try:
            caption = line.decode().strip()
        except UnicodeDecodeError:
            reason = "caption is not UTF-8"
            continue
        if len(line) > LONGEST_CAPTION:
            reason = f"caption of {len(line)} bytes, more than {LONGEST_CAPTION}"
        elif caption:
            usable.append(caption)
    if not usable:
        raise ValueError(reason)
    return usable


def field_of(text: bytes, name: str, default: Any) -> Any:
    """A field of a sample's json; `default` where there is none."""
    try:
        return json.loads(text)[name]
    except (ValueError, KeyError, TypeError):
        return default


def nouns_of(text: bytes) -> list[str]:
    """The ``nouns`` of a sample's json; empty where there is no list of texts."""
    nouns = field_of(text, "nouns", [])
    nouns = nouns if isinstance(nouns, list) else []
    return [noun for noun in nouns if isinstance(noun, str) and len(noun) <= LONGEST_CAPTION]


class NounFinder:
    """Finds the words and phrases of a list in captions, in singular or a plural in -s or -es; longer ones first."""

    def __init__(self, nouns: Sequence[str]) -> None:
        self.nouns = nouns
        choices = "|".join(re.escape(noun) for noun in sorted(set(nouns), key=lambda n: (-len(n), n)))
        self._pattern = re.compile(rf"\b({choices})(?:e?s)?\b")

    @classmethod
    def of(cls, path: str | Path) -> NounFinder:
        """A finder of the lines of a file, lower-cased."""
        try:
            nouns = [line.strip().lower() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise UserError(f"no readable noun list {path}; expected one word or phrase per line") from None
        if not any(nouns):
            raise UserError(f"{path}: empty; expected one word or phrase per line")
        return cls([noun for noun in nouns if noun])

    def find(self, captions: Sequence[str]) -> list[str]:
        """The nouns in the captions, each once, in order of appearance."""
        return list(dict.fromkeys(noun for caption in captions for noun in self._pattern.findall(caption.lower())))
