"""Atomic writes: a reader sees a whole file or none. Reading JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


class DiskFull(UserError):
    """A file cannot be written because the disk is full."""


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Raise a :class:`UserError` in place of an OSError while `path` is written; on a full disk :class:`DiskFull`."""
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside the file or folder `path`, which replaces `path` when the block ends without an error.

    An exception removes the temporary file or folder and leaves `path` untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        if temporary.is_dir():
            replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Check that a new folder can be made at `path`.

    Raises:
        UserError: `path` exists and is not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; name another one")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read. UserError: the file does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; JSON was expected") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object at the top, got {type(values).__name__}")
    return values


def json_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    with contextlib.suppress(OSError, UserError):
        return read_json(path)
    return {}


def checksum(path: Path, kind: str = "sha256") -> str:
    """The SHA-256 of a file, or its digest of another `kind` that hashlib knows, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.new(kind)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
