"""The members of a tar, from its headers alone, and the stretches of a damaged tar where members are missing."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
# An end marker is two blocks of zeros. Writers add zeros up to the next multiple of 20 blocks.
RECORD = 20 * BLOCK
LONGEST_END = RECORD + BLOCK
_MAGIC, _MAGIC_AT = b"ustar", 257
_NOT_ZERO = re.compile(rb"[^\0]")


class NotTar(Exception):
    """The file holds no header of a member, and is not all zeros."""


class Lost(NamedTuple):
    """A place of a tar where members are missing."""

    reason: str
    size: int = 0  # bytes that were members, as far as it is known


class Members:
    """Iterates over a tar's regular files as (name, offset, size), from its headers alone.

    The standard library's reader takes ten times as long, which counts with ten million members. Plain, GNU and
    POSIX (pax) headers are understood. Where a header is missing, reading continues at the next header. An end marker
    does not stop it: that may be a stretch of zeros within a tar, or the end of the first of several joined tars.

    Attributes:
        lost: the places where members are missing, after the iteration.

    Raises:
        NotTar: in the iteration.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.lost: list[Lost] = []

    def __iter__(self) -> Iterator[tuple[bytes, int, int]]:
        data, end, at = self.data, len(self.data), 0
        long_name: bytes | None = None
        long_size: int | None = None
        ended = False
        while at + BLOCK <= end:
            header = data[at : at + BLOCK]
            if not _is_header(header):
                following = self._next_header(at)
                self._note(at, following)
                at, ended = following, following == end
                long_name = long_size = None
                continue
            size = _octal(header[124:136]) if long_size is None else long_size
            kind, content = header[156:157], at + BLOCK
            if size < 0 or content + size > end:
                break
            at = content + -(-size // BLOCK) * BLOCK
            if kind == b"L":  # GNU: the next member's name
                long_name = data[content : content + min(size, 65536)].rstrip(b"\0")
                continue
            if kind == b"x":  # pax: the next member's attributes
                fields = _pax(data[content : content + min(size, 1 << 20)])
                long_name = fields.get(b"path", long_name)
                long_size = int(fields[b"size"]) if fields.get(b"size", b"").isdigit() else None
                continue
            if kind in b"0\0":
                yield long_name or _name(header), content, size
            if kind not in b"gK":  # those two describe others, and leave the next member's name alone
                long_name = long_size = None
        if end < BLOCK:
            raise NotTar
        if not ended:
            self.lost.append(Lost("cut short"))

    def _next_header(self, at: int) -> int:
        """Where the next header is, or the end of the tar."""
        place = at
        while (place := self.data.find(_MAGIC, place + 1)) >= 0:
            start = place - _MAGIC_AT
            if start > at and start % BLOCK == 0 and _is_header(self.data[start : start + BLOCK]):
                return start
        return len(self.data)

    def _note(self, at: int, following: int) -> None:
        """Note what is lost between `at`, where a header is missing, and `following`, the next header or the end."""
        size, last = following - at, following == len(self.data)
        filled = _NOT_ZERO.search(self.data, at, following)
        zeros = size if filled is None else filled.start() - at
        ends = zeros >= 2 * BLOCK
        if filled is None and size <= LONGEST_END and last:
            return
        if filled is None and size <= LONGEST_END and ends and following % RECORD == 0:
            self.lost.append(Lost(f"another tar begins at byte {following}; its samples are used"))
        elif filled is None:
            self.lost.append(Lost(f"{size} bytes at byte {at} are zeros", size))
        elif last and at == 0:
            raise NotTar
        elif last and ends:
            size -= zeros // BLOCK * BLOCK
            self.lost.append(Lost(f"{size} bytes behind the end marker at byte {at} cannot be read", size))
        else:
            self.lost.append(Lost(f"{size} bytes at byte {at} cannot be read", size))


def _is_header(block: bytes) -> bool:
    # The checksum is taken with spaces in its own place.
    return len(block) == BLOCK and sum(block[:148]) + sum(block[156:]) + 8 * 32 == _octal(block[148:156])


def _octal(field: bytes) -> int:
    """A number of a tar header: octal digits, or big-endian binary after a 0x80 byte; -1 for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records ``LENGTH KEY=VALUE\\n`` of a pax header; stops at the first malformed record."""
    fields: dict[bytes, bytes] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1:
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        fields[key] = value
        data = data[int(digits) :]
    return fields
