"""Joining further captions to shards by key: recaptioned sets are published as tables, without their photos."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import UserError, nearest
from ...files import atomic_path
from .index import NO_CAPTIONS, Shard, joined_places, open_shard, with_captions, write_joined
from .pair import LONGEST_CAPTION
from .parquet import columns_of, open_parquet, values_of
from .patterns import expand
from .photos import is_photo, key_of
from .processes import held
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
    """Store the captions of `tables` beside the shards, for the samples whose keys the tables name; returns lines that
    say what was joined, and what was not.

    Captions that were joined before stay. The files of all shards appear together at the end. Keys and captions wait in
    a temporary database on disk beside the first shard, so memory holds the captions of one shard.

    Args:
        tables: files (Parquet, JSONL, CSV, TSV), or folders with some.
        key: the column of keys. The name of a photo stands for the key that a build gives it.
        texts: the columns of captions, each a text or a list of texts; none: the first with a usual name.

    Raises:
        UserError: no shards or tables; a table cannot be read or has no such column; no key is a sample's.
    """
    files = _files(tables)
    shards = [shard for shard in map(open_shard, expand(patterns)) if not shard.gone]
    total = sum(len(shard.samples) for shard in shards)
    counts: Counter[str] = Counter()
    beside = shards[0].path.parent if os.access(shards[0].path.parent, os.W_OK) else None
    try:
        for left in beside.glob(f"{HIDDEN}*") if beside else ():
            with contextlib.suppress(OSError), held(left / "lock") as mine:
                if mine:  # a join that was killed has left it
                    shutil.rmtree(left, ignore_errors=True)
        with (
            tempfile.TemporaryDirectory(prefix=HIDDEN, dir=beside) as temporary,
            held(Path(temporary, "lock")),
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
    """The samples by key: the number of the shard, and where the sample starts in it; -1: several have the key."""
    database.execute("CREATE TABLE samples (key TEXT PRIMARY KEY, shard INTEGER, start INTEGER) WITHOUT ROWID")
    database.execute("CREATE TABLE captions (shard INTEGER, start INTEGER, text TEXT)")
    for number, shard in enumerate(shards):
        samples = shard.samples[["key", "start"]].tolist()
        database.executemany(
            "INSERT INTO samples VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET start = -1",
            [(key.decode(errors="replace"), number, start) for key, start in samples],
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
            place = database.execute("SELECT shard, start FROM samples WHERE key = ?", (name,)).fetchone()
            lists = (value if isinstance(value, list) else [value] for value in values)
            captions = [_line(text) for many in lists for text in many if isinstance(text, str)]
            captions = [text for text in captions if 0 < len(text.encode()) <= LONGEST_CAPTION]
            if place is None:
                counts["unknown"] += 1
                example = example or name
            elif place[1] < 0:
                counts["ambiguous"] += 1
            elif not captions:
                counts["empty"] += 1
            else:
                counts["captions"] += len(captions)
                database.executemany("INSERT INTO captions VALUES (?, ?, ?)", ((*place, text) for text in captions))
    return example


def _line(text: str) -> str:
    """A text on one line; JSON can hold half characters, which no file can."""
    return " ".join(text.encode(errors="replace").decode().split())


def _write_all(shards: Sequence[Shard], database: sqlite3.Connection, counts: Counter) -> None:
    """Write the files of all shards, then let them take their places."""
    database.execute("CREATE INDEX by_shard ON captions (shard)")
    with contextlib.ExitStack() as stack:
        for number, shard in enumerate(shards):
            new: defaultdict[int, list[str]] = defaultdict(list)
            query = "SELECT start, text FROM captions WHERE shard = ? ORDER BY rowid"
            for start, text in database.execute(query, (number,)):
                new[start].append(text)
            if not new:
                continue
            counts["samples"] += len(new)
            joined = NO_CAPTIONS
            with contextlib.suppress(UserError):  # those of another state of the shard are replaced
                joined = with_captions(shard).joined
            samples = []
            for key, start in shard.samples[["key", "start"]].tolist():
                both = joined.of(start) + new[start]
                kept = list(dict.fromkeys(both))
                counts["repeated"] += len(both) - len(kept)
                samples += [(key, start, kept)] if kept else []
            beside, cached = joined_places(shard.path)
            place = beside if os.access(beside.parent, os.W_OK) else cached
            write_joined(stack.enter_context(atomic_path(place)), os.path.getsize(shard.path), samples)
    counts["captions"] -= counts["repeated"]


def _rows(path: Path, key: str, texts: Sequence[str]) -> Iterator[Sequence[Any]]:
    """Key and captions of each row of a table."""

    def columns(there: Sequence[str]) -> list[str]:
        return [
            find_column(path, "key", key, (), there),
            *(find_column(path, "caption", name, CAPTION_COLUMNS, there, "--text") for name in texts or (None,)),
        ]

    try:
        if path.suffix == ".parquet":
            table = open_parquet(path)
            names = columns(columns_of(table))
            for batch in table.iter_batches(4096, columns=names):
                yield from zip(*(values_of(batch, name).to_pylist() for name in names), strict=True)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
            rows = csv.DictReader(file, delimiter=delimiter) if delimiter else map(json.loads, filter(str.strip, file))
            names = None
            for row in rows:
                names = names or columns(list(row))
                yield [row.get(name) for name in names]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table ({error})") from None
