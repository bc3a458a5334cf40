"""Joining further captions to shards by key: recaptioned sets are published as tables, without their photos."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import UserError, nearest
from ...files import atomic_path
from .index import Shard, joined_places, open_shard
from .joined import write_joined
from .pair import LONGEST_CAPTION
from .parquet import columns_of, open_parquet, values_of
from .patterns import expand
from .photos import is_photo, key_of
from .shard_set import with_captions
from .sources import CAPTION_COLUMNS, find_column

HIDDEN = ".joining-"  # begins the name of the folder of temporary files
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")


def join(
    patterns: str | Sequence[str],
    tables: Sequence[str | Path],
    *,
    key: str,
    texts: Sequence[str] = (),
    progress: bool = True,
) -> list[str]:
    """Store the captions of `tables` beside the shards, for the samples whose keys the tables name.

    The photos are not read. Captions that were joined before stay. The tables are read once, a few thousand rows at a
    time; keys and captions wait in a temporary database on disk beside the first shard. So memory holds the captions of
    one shard. The captions of all shards appear together at the end.

    Args:
        tables: files (Parquet, JSONL, CSV, TSV), or folders with some.
        key: the column of keys. The name of a photo stands for the key that a build gives it.
        texts: the columns of captions, each a text or a list of texts; none: the first with a usual name.

    Returns:
        lines that say what was joined, and what was not.

    Raises:
        UserError: no shards or tables; a table cannot be read or has no such column; no key is a sample's.
    """
    files = _files(tables)
    shards = [shard for shard in map(open_shard, expand(patterns)) if not shard.gone]
    total = sum(len(shard.samples) for shard in shards)
    counts: Counter[str] = Counter()
    beside = shards[0].path.parent
    beside = beside if os.access(beside, os.W_OK) else None
    try:
        for left in beside.glob(f"{HIDDEN}*") if beside else ():
            with _held(left) as mine:
                if mine:  # a join that was killed has left it
                    shutil.rmtree(left, ignore_errors=True)
        with (
            tempfile.TemporaryDirectory(prefix=HIDDEN, dir=beside) as temporary,
            _held(Path(temporary)),
            contextlib.closing(sqlite3.connect(f"{temporary}/captions.db", isolation_level=None)) as database,
        ):
            # Nothing in the database is to survive this process.
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
            _store_keys(shards, database)
            example = _store_captions(files, key, texts, database, counts, progress)
            if not counts["captions"]:
                known = ", ".join(f"'{found}'" for (found,) in database.execute("SELECT key FROM samples LIMIT 2"))
                hint = f"; column '{key}' holds '{example}' and the like, the samples have {known}" if example else ""
                raise UserError(f"{files[0]}: no row has a caption and the key of a sample{hint}")
            _write_all(shards, database, counts)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{shards[0].path}: captions cannot be stored beside it: {error}") from None
    lines = [
        f"joined {counts['captions']} captions to {counts['samples']} of {total} samples",
        f"{total - counts['samples']} samples have no new caption",
        f"{counts['unknown']} rows have the key of no sample, such as '{example}'",
        f"{counts['ambiguous']} rows have the key of several samples, and were left out",
        f"{counts['empty']} rows have no caption of 1 to {LONGEST_CAPTION} bytes",
        f"{counts['repeated']} captions repeat one that their sample has",
    ]
    return [line for line in lines if not line.startswith("0 ")]


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process; False: another process holds it, or its file system knows no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = True
    except OSError:
        mine = False
    try:
        yield mine
    finally:
        os.close(descriptor)


def _files(tables: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for table in map(Path, tables):
        inside = sorted(path for path in table.rglob("*") if path.suffix in SUFFIXES) if table.is_dir() else [table]
        if not inside:
            raise UserError(f"{table}: no table; expected files that end in {' or '.join(SUFFIXES)}")
        if not inside[0].is_file():
            raise UserError(f"no {table}{nearest(str(table), map(str, table.parent.glob('*')))}")
        files += inside
    return files


def _store_keys(shards: Sequence[Shard], database: sqlite3.Connection) -> None:
    """The samples by key; several samples of a key get the number -1."""
    database.execute("CREATE TABLE samples (key TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
    database.execute("CREATE TABLE captions (number INTEGER, text TEXT)")
    keys = (key.decode(errors="replace") for shard in shards for key in shard.samples["key"])
    database.executemany(
        "INSERT INTO samples VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET number = -1",
        ((key, number) for number, key in enumerate(keys)),
    )


def _store_captions(
    files: Sequence[Path], key: str, texts: Sequence[str], database: sqlite3.Connection, counts: Counter, progress: bool
) -> str:
    """The captions by sample; returns an example of a key of no sample."""
    example = ""
    for file in files:
        for found, *values in tqdm(_rows(file, key, texts), unit="row", desc=file.name, disable=not progress):
            name = _line(str(found))
            name = key_of(name) if is_photo(name) else name
            (number,) = database.execute("SELECT number FROM samples WHERE key = ?", (name,)).fetchone() or (None,)
            lists = (value if isinstance(value, list) else [value] for value in values)
            captions = [_line(text) for many in lists for text in many if isinstance(text, str)]
            captions = [text for text in captions if 0 < len(text.encode()) <= LONGEST_CAPTION]
            if number is None:
                counts["unknown"] += 1
                example = example or name
            elif number < 0:
                counts["ambiguous"] += 1
            elif not captions:
                counts["empty"] += 1
            else:
                counts["captions"] += len(captions)
                database.executemany("INSERT INTO captions VALUES (?, ?)", ((number, text) for text in captions))
    return example


def _line(text: str) -> str:
    """A text on one line; JSON can hold half characters, which no file can."""
    return " ".join(text.encode(errors="replace").decode().split())


def _write_all(shards: Sequence[Shard], database: sqlite3.Connection, counts: Counter) -> None:
    """Write the files of all shards, then let them take their places."""
    database.execute("CREATE INDEX by_number ON captions (number)")
    first = 0
    with contextlib.ExitStack() as stack:
        for shard in shards:
            last = first + len(shard.samples)
            query = "SELECT number, text FROM captions WHERE number >= ? AND number < ? ORDER BY number, rowid"
            captions: dict[int, list[str]] = {}
            for number, text in database.execute(query, (first, last)):
                captions.setdefault(number - first, []).append(text)
            first = last
            if not captions:
                continue
            counts["samples"] += len(captions)
            joined = None
            with contextlib.suppress(UserError):  # those of another state of the shard are replaced
                joined = with_captions(shard).joined
            samples = []
            for place, record in enumerate(shard.samples):
                start = int(record["start"])
                both = [*(joined.of(start) if joined else ()), *captions.get(place, ())]
                kept = list(dict.fromkeys(both))
                counts["repeated"] += len(both) - len(kept)
                samples += [(bytes(record["key"]), start, kept)] if kept else []
            beside, cached = joined_places(shard.path)
            place = beside if os.access(beside.parent, os.W_OK) else cached
            write_joined(stack.enter_context(atomic_path(place)), os.path.getsize(shard.path), samples)
    counts["captions"] -= counts["repeated"]


def _rows(path: Path, key: str, texts: Sequence[str]) -> Iterator[list[Any]]:
    """Key and captions of each row of a table."""

    def columns(there: Sequence[str]) -> list[str]:
        return [
            *(find_column(path, "column", name, (), there) for name in (key, *texts)),
            *(() if texts else [find_column(path, "caption", None, CAPTION_COLUMNS, there, option="--text")]),
        ]

    try:
        if path.suffix == ".parquet":
            table = open_parquet(path)
            names = columns(columns_of(table))
            for batch in table.iter_batches(4096, columns=names):
                yield from map(list, zip(*(values_of(batch, name).to_pylist() for name in names), strict=True))
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".csv", ".tsv"):
                rows: Iterator[dict] = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            else:
                rows = (json.loads(line) for line in file if line.strip())
            names = None
            for row in rows:
                names = names or columns(list(row))
                yield [row.get(name) for name in names]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table ({error})") from None
