"""Parquet files as a source of samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError, extra, nearest
from .pair import Pair, checked
from .photos import key_of
from .scan import Bad
from .sources import CAPTION_COLUMNS, Source, Stretches, find_column

IMAGE_COLUMNS = ("image", "image.bytes", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


def rows_of_parquet(
    path: Path, split: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> Source:
    """Rows of Parquet files with encoded photos (bytes, or Hugging Face's ``{bytes, path}``) and captions.

    Args:
        path: a file, or a folder with some.
        split: only the files that are called ``<split>-*.parquet`` or lie in a folder of that name.
        image_column, caption_column: None: the usual names are tried.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if split is not None:
        splits = {file: {file.stem.partition("-")[0], file.parent.name} for file in files}
        files = [file for file in files if split in splits[file]]
        if not files:
            choices = sorted(set().union(*splits.values()) - {path.name})
            raise UserError(f"{path}: no Parquet files of split '{split}'{nearest(split, choices)}")
    stretches = []
    for file in files:
        table = open_parquet(file)
        stretches.append((file, range(table.metadata.num_rows)))
        columns = columns_of(table)
        image_column = find_column(file, "image", image_column, IMAGE_COLUMNS, columns)
        caption_column = find_column(file, "caption", caption_column, CAPTION_COLUMNS, columns)
    assert image_column is not None and caption_column is not None, f"{path}: no Parquet files"
    root = path if path.is_dir() else path.parent
    return Source(Stretches(stretches), partial(_read, root, image_column, caption_column), files)


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``. Raises a :class:`UserError` if it cannot be read or pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading Parquet files needs pyarrow: {extra('parquet')}") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def columns_of(table: Any) -> list[str]:
    """Names of columns; a struct's fields follow it as ``column.field``."""
    names = ([column.name, *(field.name for field in column.flatten())] for column in table.schema_arrow)
    return list(dict.fromkeys(itertools.chain(*names)))


def values_of(batch: Any, name: str) -> Any:
    """A column of a record batch, or the field ``column.field`` of a struct."""
    if name in batch.schema.names:
        return batch.column(name)
    column, _, field = name.rpartition(".")
    return batch.column(column).field(field)


def _read(root: Path, image_column: str, caption_column: str, places: Stretches) -> Iterator[Pair | Bad]:
    for path, rows in places.parts:
        stem = key_of(path.relative_to(root))
        table, after = open_parquet(path), 0
        for group in range(table.num_row_groups):
            row, after = after, after + table.metadata.row_group(group).num_rows
            if after <= rows.start or row >= rows.stop:  # other row groups are not read
                continue
            # Small batches: a photo may have megabytes.
            for batch in table.iter_batches(32, row_groups=[group], columns=[image_column, caption_column]):
                images, captions = values_of(batch, image_column), values_of(batch, caption_column)
                for number, (image, caption) in enumerate(zip(images, captions, strict=True), row):
                    if number in rows:
                        yield _sample(path, f"{stem}-{number:08d}", image.as_py(), caption.as_py())
                row += len(batch)


def _sample(path: Path, key: str, image: Any, caption: Any) -> Pair | Bad:
    if isinstance(image, dict):  # Hugging Face's images
        named, image = image.get("path"), image.get("bytes")
        if image is None and named:
            return Bad(str(path), key, "the table holds the path of a photo, not the photo")
    if not isinstance(image, bytes) or not image:
        return Bad(str(path), key, "no image")
    captions = caption if isinstance(caption, list) else [caption]
    text = "\n".join(" ".join(text.split()) for text in captions if isinstance(text, str))
    return checked(path, key, image, text.encode(errors="replace"))
