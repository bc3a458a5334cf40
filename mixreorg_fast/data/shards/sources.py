"""What shards are built from: photo files with captions (``photos.py``), Parquet files, or what img2dataset left.

A source is a sized, sliceable iterable of samples: slices go to processes of their own, so they hold places rather than
photos. Iterating yields a :class:`Pair`, or a :class:`~.shards.Bad` in place of a sample that is of no use.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...errors import UserError, extra, nearest
from . import photos
from .pairs import CAPTION_COLUMNS, Pair, checked, find_column
from .processes import pool
from .shards import Bad, scan

IMAGE_COLUMNS = ("image", "image.bytes", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


class Source(Protocol):
    """Samples 0 … ``len(source) - 1``; ``source[first:last]`` is a source too."""

    left_out: tuple[Bad, ...]  # what gives no sample, found when the source was opened

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Source: ...

    def __iter__(self) -> Iterator[Pair | Bad]: ...

    def files(self) -> list[Path]:
        """What the samples come from: when one of these changes, an interrupted build cannot go on."""
        ...


def open_source(
    path: str | Path,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    workers: int = 1,
) -> Source:
    """The source at `path`, its kind told by what lies there (see docs/data.md).

    Args:
        split: of photos in a table, only those that ``splits/<split>.txt`` lists; of a folder of Parquet files, those
            that are called ``<split>-*.parquet`` or lie in a folder of that name.
        images: the folder of the photos that a table names; None: the table's, or ``images`` in it.
        image_column, caption_column: of a table or Parquet files; None: the usual names are tried.
        workers: processes that look through img2dataset's tars.

    Raises:
        UserError: nothing of the kind lies there, or it lacks something.
    """
    path = Path(path).expanduser()
    kind = _kind(path)
    columns = {"image_column": image_column, "caption_column": caption_column}
    options = {"split": split, "images": images, **columns}
    for name, value in options.items():
        if value is not None and name not in kind.options:
            raise UserError(f"--{name.replace('_', '-')} {value}: not for {path}, which is {kind.description}")
    if kind is TABLE:
        return photos.listed(photos.table_of(path), split=split, images=images, **columns)
    if kind is TEXTS:
        return photos.beside_texts(path)
    if kind is PARQUET:
        return Parquet.open(path, split, image_column, caption_column)
    return Img2dataset.open(path, workers)


class Kind(NamedTuple):
    """A kind of source, and the options of :func:`open_source` that it has."""

    description: str
    options: tuple[str, ...] = ()


TABLE = Kind("a table of photos", ("split", "images", "image_column", "caption_column"))
TEXTS = Kind("a folder of photos and text files")
TARS = Kind("a folder of tars (img2dataset's)")
PARQUET = Kind("Parquet", ("split", "image_column", "caption_column"))


def _kind(path: Path) -> Kind:
    if not path.exists():
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no {path}{nearest(str(path), siblings) if siblings else ''}")
    if photos.table_of(path) is not None:
        return TABLE
    if path.suffix == ".parquet" and path.is_file():
        return PARQUET
    if path.is_dir():
        # img2dataset writes a table beside each of its tars, so tars come first.
        if any(path.glob("*.tar")):
            return TARS
        if photos.has_pair(path):
            return TEXTS
        if any(path.rglob("*.parquet")):
            return PARQUET
    raise UserError(
        f"{path}: nothing to build shards from; expected photos with a NAME.txt beside each NAME.jpg, a CSV (or a "
        f"folder with {' or '.join(photos.TABLES)}), Parquet files, or img2dataset's output (webdataset)"
    )


# ---------------------------------------------------------------------- tables and tars: places in files

# A stretch of a file's samples: first and last + 1.
Stretch = tuple[Path, int, int]


def _cut(stretches: Sequence[Stretch], part: slice) -> tuple[Stretch, ...]:
    """The stretches of samples ``part.start … part.stop - 1`` of all, counted through."""
    first, last, _ = part.indices(_count(stretches))
    kept, before = [], 0
    for path, start, stop in stretches:
        begin, end = max(first - before, 0), min(last - before, stop - start)
        if begin < end:
            kept.append((path, start + begin, start + end))
        before += stop - start
    return tuple(kept)


def _count(stretches: Sequence[Stretch]) -> int:
    return sum(stop - start for _, start, stop in stretches)


@dataclass(frozen=True)
class Parquet:
    """Rows of Parquet files with encoded photos (bytes, or Hugging Face's ``{bytes, path}``) and captions."""

    stretches: tuple[Stretch, ...]
    image: str
    caption: str
    root: Path
    left_out = ()

    @classmethod
    def open(cls, path: Path, split: str | None, image: str | None, caption: str | None) -> Parquet:
        parquet = _pyarrow()
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if split is not None:
            splits = {file: {file.stem.partition("-")[0], file.parent.name} for file in files}
            files = [file for file in files if split in splits[file]]
            if not files:
                choices = sorted(set().union(*splits.values()) - {path.name})
                raise UserError(f"{path}: no Parquet files of split '{split}'{nearest(split, choices)}")
        stretches = []
        for file in files:
            try:
                table = parquet.ParquetFile(file)
                stretches.append((file, 0, table.metadata.num_rows))
                columns = _columns(table.schema_arrow)
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
                raise UserError(f"{file}: not a readable Parquet file: {error}") from None
            image = find_column(file, "image", image, IMAGE_COLUMNS, columns)
            caption = find_column(file, "caption", caption, CAPTION_COLUMNS, columns)
        return cls(tuple(stretches), image, caption, path if path.is_dir() else path.parent)

    def __len__(self) -> int:
        return _count(self.stretches)

    def __getitem__(self, part: slice) -> Parquet:
        return replace(self, stretches=_cut(self.stretches, part))

    def __iter__(self) -> Iterator[Pair | Bad]:
        for path, first, last in self.stretches:
            stem = path.relative_to(self.root).with_suffix("").as_posix().replace(".", "_")
            for row, image, caption in self._rows(path, first, last):
                yield _row_sample(path, f"{stem}-{row:08d}", image, caption)

    def files(self) -> list[Path]:
        return [path for path, _, _ in self.stretches]

    def _rows(self, path: Path, first: int, last: int) -> Iterator[tuple[int, Any, Any]]:
        """Row numbers, photos and captions; of the row groups that hold rows first … last - 1 alone."""
        table = _pyarrow().ParquetFile(path)
        counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        ends = [sum(counts[: group + 1]) for group in range(len(counts))]
        groups = [g for g, end in enumerate(ends) if end > first and end - counts[g] < last]
        row = ends[groups[0]] - counts[groups[0]]
        tops = list(dict.fromkeys(_top(name, table.schema_arrow.names) for name in (self.image, self.caption)))
        # Small batches: a photo may have megabytes.
        for batch in table.iter_batches(32, row_groups=groups, columns=tops):
            if row + len(batch) > first and row < last:
                images, captions = (_values(batch, name) for name in (self.image, self.caption))
                for place in range(max(first - row, 0), min(last - row, len(batch))):
                    yield row + place, images[place].as_py(), captions[place].as_py()
            row += len(batch)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"reading Parquet files needs pyarrow: {extra('parquet')}") from None
    return parquet


def _columns(schema: Any) -> list[str]:
    """Names of columns; a struct's fields follow it as ``column.field``."""
    names = []
    for field in schema:
        names.append(field.name)
        if str(field.type).startswith("struct"):
            names += [f"{field.name}.{field.type.field(number).name}" for number in range(field.type.num_fields)]
    return names


def _top(name: str, columns: Sequence[str]) -> str:
    return name if name in columns else name.rpartition(".")[0]


def _values(batch: Any, name: str) -> Any:
    """A column, or the field ``column.field`` of a struct."""
    top = _top(name, batch.schema.names)
    column = batch.column(top)
    return column if top == name else column.field(name.rpartition(".")[2])


def _row_sample(path: Path, key: str, image: Any, caption: Any) -> Pair | Bad:
    captions = [text for text in (caption if isinstance(caption, list) else [caption]) if isinstance(text, str)]
    if isinstance(image, dict):  # Hugging Face's images
        named, image = image.get("path"), image.get("bytes")
        if image is None and named:
            return Bad(str(path), key, "the table holds the path of a photo, not the photo")
    if not isinstance(image, bytes) or not image:
        return Bad(str(path), key, "no image")
    text = "\n".join(" ".join(text.split()) for text in captions)
    return checked(path, key, image, text.encode(errors="replace"))


@dataclass(frozen=True)
class Img2dataset:
    """The tars of ``img2dataset --output_format webdataset``: those it finished, samples whose status is success."""

    stretches: tuple[Stretch, ...]
    left_out: tuple[Bad, ...] = ()  # tars that img2dataset was interrupted in

    @classmethod
    def open(cls, root: Path, workers: int) -> Img2dataset:
        tars = sorted(root.glob("*.tar"))
        # img2dataset writes a shard's statistics last.
        done = [tar for tar in tars if tar.with_name(f"{tar.stem}_stats.json").is_file()]
        if not done:
            raise UserError(
                f"{root}: {tars[0].name} has no {tars[0].stem}_stats.json; expected img2dataset's output "
                f"(other WebDataset tars can be trained on as they are)"
            )
        with pool(min(workers, len(done))) as run:
            sizes = list(run(_tar_size, done))
        reason = "img2dataset did not finish this tar (it has no _stats.json)"
        left_out = tuple(Bad(str(tar), "", reason) for tar in tars if tar not in set(done))
        return cls(tuple((tar, 0, size) for tar, size in zip(done, sizes, strict=True)), left_out)

    def __len__(self) -> int:
        return _count(self.stretches)

    def __getitem__(self, part: slice) -> Img2dataset:
        return replace(self, stretches=_cut(self.stretches, part))

    def __iter__(self) -> Iterator[Pair | Bad]:
        for tar, first, last in self.stretches:
            entries = _tar_entries(tar)
            with open(tar, "rb") as file:
                for entry in entries[first:last]:
                    yield entry if isinstance(entry, Bad) else _tar_sample(tar, file.fileno(), entry)

    def files(self) -> list[Path]:
        return [tar for tar, _, _ in self.stretches]


def _tar_entries(tar: Path) -> list[dict | Bad]:
    status = tar.stat()
    return _scanned(tar, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # slices of a tar follow one another
def _scanned(tar: Path, size: int, mtime_ns: int) -> list[dict | Bad]:
    """The samples of a tar in order, and after them what it lacks."""
    samples, left_out = scan(tar)
    return [*samples, *(Bad(str(tar), key, reason) for key, reason, _ in left_out)]


def _tar_size(tar: Path) -> int:
    return len(_tar_entries(tar))


def _tar_sample(tar: Path, file: int, entry: dict) -> Pair | Bad:
    key = entry["key"].decode(errors="replace")

    def member(name: str) -> bytes:
        return os.pread(file, entry[f"{name}_size"], entry["start"] + entry[f"{name}_at"])

    try:
        about = json.loads(member("json") or b"{}")
    except ValueError:
        about = {}
    status = about.get("status", "success") if isinstance(about, dict) else "success"
    if status != "success":
        return Bad(str(tar), key, f"status {status}")
    return checked(tar, key, member("image"), member("text"))


# ---------------------------------------------------------------------- nouns


def read_nouns(path: str | Path) -> list[str]:
    """The lines of a noun list, lower-cased.

    Raises:
        UserError: the file is missing or empty.
    """
    try:
        nouns = [line.strip().lower() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"no readable noun list {path}; expected a text file with one word or phrase per line"
        ) from None
    if not nouns:
        raise UserError(f"{path}: empty; expected one word or phrase per line")
    return nouns


class NounFinder:
    """Finds the words and phrases of a list in captions, in singular or a plural in -s or -es; longer ones first."""

    def __init__(self, nouns: Sequence[str]) -> None:
        choices = "|".join(re.escape(noun) for noun in sorted(set(nouns), key=lambda n: (-len(n), n)))
        self._pattern = re.compile(rf"\b({choices})(?:e?s)?\b")

    def find(self, captions: Sequence[str]) -> list[str]:
        """The nouns in the captions, each once, in order of appearance."""
        return list(dict.fromkeys(noun for caption in captions for noun in self._pattern.findall(caption.lower())))
