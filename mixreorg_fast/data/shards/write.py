"""Writing a shard."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ...files import atomic_path
from .pair import Pair


def write_shard(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one tar; it appears under its name when it is complete. Repeated keys get a number appended."""
    keys: Counter[str] = Counter()
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for pair in pairs:
            keys[pair.key] += 1
            if keys[pair.key] > 1:  # members with the same name would be taken for one sample
                pair = replace(pair, key=f"{pair.key}-{keys[pair.key]}")
            _append(tar, pair)


def _append(tar: tarfile.TarFile, pair: Pair) -> None:
    text = "\n".join(" ".join(caption.split()) for caption in pair.captions)
    members = {pair.extension: pair.image, "txt": text.encode()}
    if pair.fields is not None:
        members["json"] = json.dumps(pair.fields, ensure_ascii=False).encode()
    for extension, data in members.items():
        # No times, owners or modes of this machine: the same samples give the same bytes.
        info = tarfile.TarInfo(f"{pair.key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
