"""Fetching one file over HTTP: in one piece where all is well, else resumed where it was cut."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path

from ...errors import UserError
from ...files import checksum, saving, sync
from ..shards.patterns import without_secrets
from .sources import RemoteShard, login_hint, request

log = logging.getLogger("mixreorg_fast")
BLOCK = 1 << 20  # bytes
MISMATCHES = 3  # a file whose checksum differs as often is damaged at its source
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # temporary failures


class Stopped(Exception):
    """Fetching was stopped from outside; what has been fetched is kept."""


def partial_path(path: Path) -> Path:
    """Where the bytes of a file lie until it is complete."""
    return path.with_name(f".{path.name}.partial")


def fetch(shard: RemoteShard, path: Path, patience: float, stop: threading.Event, room: Callable[[int], None]) -> None:
    """Fetch a shard to `path`, which appears when it is complete and its size and checksum are right.

    The bytes lie in a hidden file beside `path`; another call resumes there. The file's time is 0 if the source has
    versions, else the server's, so that a shard's index stays valid when the shard is fetched again.

    Args:
        patience: seconds without a byte after which the source counts as lost.
        room: called with the file's size before the first byte is written.

    Raises:
        UserError: the source refuses, is lost, or has a damaged file.
        DiskFull, Stopped
    """
    partial, note = partial_path(path), path.with_name(f".{path.name}.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(MISMATCHES):
        headers = _fetch_bytes(shard, partial, note, _Waits(shard, patience, stop), room)
        kind, _, expected = (shard.checksum or "").partition(":")
        if not kind or _keyed(headers) or checksum(partial, kind) == expected:
            break
        log.warning("%s: its checksum differs; it is fetched again", shard)
        partial.unlink()
    else:
        raise UserError(f"{shard}: fetched {MISMATCHES} times with another checksum than its source says")
    sync(partial)
    modified = 0 if shard.version else _time(headers.get("Last-Modified", ""))
    if modified is not None:
        os.utime(partial, (0, modified))
    os.replace(partial, path)
    note.unlink(missing_ok=True)


def _fetch_bytes(shard: RemoteShard, partial: Path, note: Path, waits: _Waits, room: Callable[[int], None]) -> Message:
    """Fetch until `partial` is complete; returns the headers of the last answer, none if nothing was missing."""
    whole, headers = shard.size, Message()
    while True:
        have = partial.stat().st_size if partial.exists() else 0
        if have == whole:
            return headers
        if whole is not None and have > whole:
            partial.unlink()
            have = 0
        asked = request(shard)
        if have:
            asked.add_header("Range", f"bytes={have}-")
            # Without a version of the source, the server's own mark says whether the file is still the same.
            if not shard.version:
                asked.add_header("If-Range", note.read_text() if note.exists() else '"none"')
        try:
            with urllib.request.urlopen(asked, timeout=waits.silence) as answer:
                if answer.status != 206:  # the server sends all of it: the file changed, or it knows no ranges
                    have = 0
                headers = answer.headers
                whole = _size(headers, have) or whole
                if shard.size is not None and whole != shard.size:
                    raise http.client.HTTPException(f"{whole} bytes instead of {shard.size}")
                room(whole or 0)
                with saving(partial):  # no retry catches its UserError
                    if not shard.version:
                        note.write_text(headers.get("ETag", '"none"'))
                    file = open(partial, "ab" if have else "wb")  # noqa: SIM115
                with file:
                    while block := answer.read1(BLOCK):  # as much as has come
                        with saving(partial):
                            file.write(block)
                            file.flush()
                        waits.progress(file.tell())
                if whole is None:  # a server that tells no size ends the connection after the last byte
                    return headers
                if partial.stat().st_size < whole:
                    waits.wait("the connection was cut")
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # beyond the end: the bytes here are of another file
                partial.unlink()
            elif error.code in AGAIN:
                waits.wait(f"{error.code} {error.reason}", _seconds(error.headers.get("Retry-After", "")))
            else:
                said = error.headers.get("X-Error-Message") or error.reason
                hint = login_hint(shard.url) if error.code in (401, 403) else ""
                raise UserError(f"{shard}: {error.code} {without_secrets(said)}{hint}") from None
        except (OSError, http.client.HTTPException) as error:
            waits.wait(str(getattr(error, "reason", error)) or type(error).__name__)


class _Waits:
    """Waits between attempts: longer each time, until nothing has come for `patience` seconds."""

    def __init__(self, shard: RemoteShard, patience: float, stop: threading.Event) -> None:
        self._shard, self._patience, self._stop = shard, patience, stop
        self.silence = max(1.0, min(60.0, patience / 4))  # seconds without a byte after which a connection is given up
        self._best = -1
        self.progress(0)

    def progress(self, have: int) -> None:
        """Note that so many bytes are here; a server that ends each time at the same byte makes no progress."""
        if self._stop.is_set():
            raise Stopped
        if have > self._best:
            self._best, self._last, self._next = have, time.monotonic(), self._patience / 600
            self._told = False

    def wait(self, reason: str, asked: float = 0.0) -> None:
        """Wait before another attempt, at least `asked` seconds. Raises a UserError if nothing came for too long."""
        lost, reason = time.monotonic() - self._last, without_secrets(reason)
        if lost > self._patience:
            raise UserError(f"{self._shard}: {reason}; nothing came for {lost:.0f} s (data.cache.patience)")
        seconds = min(max(self._next, asked), self._patience)
        if not self._told and lost + seconds > self._patience / 20:
            log.warning("%s: %s; trying again for up to %.0f s", self._shard, reason, self._patience)
            self._told = True
        self._next = min(2 * self._next, self._patience / 10)
        if self._stop.wait(seconds):
            raise Stopped


def _size(headers: Message, have: int) -> int | None:
    """The whole file's size by the headers of an answer that starts at byte `have`."""
    if have:
        found = re.fullmatch(rf"bytes {have}-\d+/(\d+)", headers.get("Content-Range", ""))
        if not found:
            raise http.client.HTTPException("another range than was asked for")
        return int(found[1])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _keyed(headers: Message) -> bool:
    """Whether S3 encrypts the object with a key of KMS or of the user: then its ETag is not its MD5."""
    kms = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
    return kms or "x-amz-server-side-encryption-customer-algorithm" in headers


def _time(header: str) -> float | None:
    """The seconds since 1970 of a header's date."""
    with contextlib.suppress(ValueError, TypeError):
        return email.utils.parsedate_to_datetime(header).timestamp()
    return None


def _seconds(header: str) -> float:
    """Seconds of a ``Retry-After`` header, which holds seconds or a date; without either, less than zero."""
    try:
        return float(header)
    except ValueError:
        return (_time(header) or 0.0) - time.time()
