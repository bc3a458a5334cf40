"""Records of what cannot be used: it never stops a reader, but is left out, counted and listed."""

from __future__ import annotations

from typing import NamedTuple


class Bad(NamedTuple):
    """A part of a shard, or of a source of shards, that cannot be used; an empty key stands for the file itself."""

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
