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
_MAGIC, _MAGIC_AT = re.compile(rb"ustar"), 257
_NOT_ZERO = re.compile(rb"[^\0]")


class Lost(NamedTuple):
    """A place of a tar where members are missing."""

    reason: str
    size: int = 0  # bytes that were members, as far as it is known


NOT_TAR = Lost("not a tar file; expected a tar of images and captions")  # without a header, and not all zeros


def members(data: mmap.mmap, lost: list[Lost]) -> Iterator[tuple[bytes, int, int]]:
    """A tar's regular files as (name, offset, size), from its headers alone; adds to `lost` where members are missing.

    The standard library's reader takes ten times as long, which matters with ten million members. Plain, GNU and
    POSIX (pax) headers are understood. Where a header is missing, reading continues at the next header. It continues
    after an end marker too: the marker may be a stretch of zeros within a tar, or end the first of several joined tars.
    """
    end, at = len(data), 0
    long_name: bytes | None = None
    long_size: int | None = None
    while at + BLOCK <= end:
        header = data[at : at + BLOCK]
        if not _is_header(header):
            following = _next_header(data, at)
            if gap := _gap(data, at, following):
                lost.append(gap)
            if following == end:
                return
            at, long_name, long_size = following, None, None
            continue
        size = _octal(header[124:136]) if long_size is None else long_size
        kind, content = header[156:157], at + BLOCK
        if size < 0 or content + size > end:
            break
        at = content + -(-size // BLOCK) * BLOCK
        if kind == b"L":  # GNU: the next member's name
            long_name = data[content : content + min(size, 65536)].rstrip(b"\0")
        elif kind == b"x":  # pax: the next member's attributes
            fields = _pax(data[content : content + min(size, 1 << 20)])
            long_name = fields.get(b"path", long_name)
            long_size = int(fields[b"size"]) if fields.get(b"size", b"").isdigit() else None
        elif kind not in b"gK":  # these two do not describe the next member, so its name is kept
            if kind in b"0\0":
                yield long_name or _name(header), content, size
            long_name = long_size = None
    lost.append(NOT_TAR if end < BLOCK else Lost("cut short"))


def _next_header(data: mmap.mmap, at: int) -> int:
    """Where the next header is, or the end of the tar."""
    for magic in _MAGIC.finditer(data, at + 1):
        start = magic.start() - _MAGIC_AT
        if start > at and start % BLOCK == 0 and _is_header(data[start : start + BLOCK]):
            return start
    return len(data)


def _gap(data: mmap.mmap, at: int, following: int) -> Lost | None:
    """What is lost between `at`, where a header is missing, and `following`, the next header or the end."""
    size, last = following - at, following == len(data)
    filled = _NOT_ZERO.search(data, at, following)
    if filled is None:
        if size <= LONGEST_END and last:
            return None
        if 2 * BLOCK <= size <= LONGEST_END and following % RECORD == 0:
            return Lost(f"another tar begins at byte {following}; its samples are used")
        return Lost(f"{size} bytes at byte {at} are zeros", size)
    if last and at == 0:
        return NOT_TAR
    zeros = filled.start() - at
    if last and zeros >= 2 * BLOCK:
        size -= zeros // BLOCK * BLOCK
        return Lost(f"{size} bytes behind the end marker at byte {at} cannot be read", size)
    return Lost(f"{size} bytes at byte {at} cannot be read", size)


def _is_header(block: bytes) -> bool:
    # The checksum is taken with spaces in its own place.
    return len(block) == BLOCK and sum(block[:148]) + sum(block[156:]) + 8 * 32 == _octal(block[148:156])


def _octal(field: bytes) -> int:
    """A number of a tar header: octal digits, or big-endian binary after a 0x80 byte; -1 for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records ``LENGTH KEY=VALUE\\n`` of a pax header; stops at the first malformed record."""
    fields: dict[bytes, bytes] = {}
    while (found := re.match(rb"(\d+) ", data)) and (length := int(found[1])) > found.end():
        key, _, value = data[found.end() : length - 1].partition(b"=")
        fields[key] = value
        data = data[length:]
    return fields
