"""The samples of a tar, from its headers alone, and records of what cannot be used.

A sample is consecutive members of the tar with the same key (the file name up to its first dot): an image
(``.jpg .jpeg .png .webp``), a ``.txt`` with one caption per line, and optionally a ``.json`` with ``nouns``.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .tar import Lost, members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Bytes. A larger member is not a photo, and reading it would only cost memory.
LARGEST_MEMBER = 256 << 20


class Bad(NamedTuple):
    """A part of a shard, or of a source of shards, that cannot be used; an empty key stands for the file itself.

    It never stops a reader, but is left out, counted and listed.
    """

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        """``shard TAB key TAB reason`` on one line, whatever bytes a key is made of."""
        return "\t".join("".join(c if c.isprintable() else "\ufffd" for c in part) for part in self)


class LeftOut(NamedTuple):
    """What an index leaves out of a shard; the key is empty where whole parts of the tar are missing."""

    key: str
    reason: str
    samples: int = 1  # an estimate where the key is empty


def scan(path: Path) -> tuple[list[dict], list[LeftOut]]:
    """Samples of a tar, and what is incomplete or lost.

    Returns:
        samples: for each `key`, `start` and `span` (bytes), and the place (from `start`) and size of each member:
            `image_at`, `image_size`, `text_at`, `text_size`, `json_at`, `json_size`.
        left_out: samples that lack an image or a caption, then lost parts of the tar.
    """
    samples: list[dict] = []
    left_out: list[LeftOut] = []
    lost: list[Lost] = []
    if not os.path.getsize(path):
        return [], [LeftOut("", "empty file; expected a tar of images and captions")]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] == b"\x1f\x8b":
            return [], [LeftOut("", "compressed tar; shards are read in place, so expand it first with gunzip")]
        keyed = ((*_split_name(name), offset, size) for name, offset, size in members(data, lost))
        for key, group in itertools.groupby(keyed, key=lambda member: member[0]):
            sample = _group(key, {extension: (offset, size) for _, extension, offset, size in group})
            if isinstance(sample, str):
                left_out.append(LeftOut(key.decode(errors="replace"), sample))
            elif sample is not None:
                samples.append(sample)
        readable = max(1, len(data) - sum(gap.size for gap in lost))
    left_out += [LeftOut("", gap.reason, max(1, round(gap.size * len(samples) / readable))) for gap in lost]
    return samples, left_out


def read_member(file: int, sample: Mapping | np.void, name: str) -> bytes:
    """The `image`, `text` or `json` of a sample, from the tar's open `file` descriptor."""
    return os.pread(file, int(sample[f"{name}_size"]), int(sample["start"] + sample[f"{name}_at"]))


def _split_name(name: bytes) -> tuple[bytes, str]:
    """WebDataset's rule: the key is the path up to the first dot of the file name, the extension is the rest."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, extension = file.partition(b".")
    return folder + slash + stem, extension.decode(errors="replace").lower()


def _group(key: bytes, members: dict[str, tuple[int, int]]) -> dict | str | None:
    """Index fields of one sample, or what it lacks; None without an image and without a text."""
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    text = members.get("txt")
    if image is None:
        reason = f"no image ({', '.join('.' + extension for extension in IMAGE_EXTENSIONS)})"
        return None if text is None else reason
    if text is None:
        return "no caption (.txt)"
    places = {"image": image, "text": text, "json": members.get("json", (text[0], 0))}
    start = min(offset for offset, _ in places.values())
    span = max(offset + size for offset, size in places.values()) - start
    if span > LARGEST_MEMBER:
        return f"{span} bytes, more than {LARGEST_MEMBER}"
    at = {f"{name}_at": offset - start for name, (offset, _) in places.items()}
    return {"key": key, "start": start, "span": span, **at, **{f"{name}_size": places[name][1] for name in places}}
