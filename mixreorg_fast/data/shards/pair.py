"""A photo with its captions, the checks that every source makes, and writing pairs to a shard."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...files import atomic_path
from .captions import captions_of
from .scan import LARGEST_MEMBER, Bad


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
    """``jpg``, ``png`` or ``webp`` by a photo's first bytes.

    Raises:
        ValueError: it is none of them.
    """
    if image[:3] == b"\xff\xd8\xff":
        return "jpg"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise ValueError("not a JPEG, PNG or WebP image")


def write_shard(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one tar; it appears under its name when it is complete. Repeated keys get a number appended."""
    keys: Counter[str] = Counter()
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for pair in pairs:
            keys[pair.key] += 1
            repeated = keys[pair.key] > 1  # members with the same name would be taken for one sample
            key = f"{pair.key}-{keys[pair.key]}" if repeated else pair.key
            text = "\n".join(" ".join(caption.split()) for caption in pair.captions)
            members = {pair.extension: pair.image, "txt": text.encode()}
            if pair.fields is not None:
                members["json"] = json.dumps(pair.fields, ensure_ascii=False).encode()
            for extension, data in members.items():
                # No times, owners or modes of this machine: the same samples give the same bytes.
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
