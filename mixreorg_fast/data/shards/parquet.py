"""Parquet files as a source of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, extra, nearest
from .bad import Bad
from .pair import CAPTION_COLUMNS, Pair, checked, find_column
from .stretches import Stretches

IMAGE_COLUMNS = ("image", "image.bytes", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


@dataclass(frozen=True)
class Parquet(Stretches):
    """Rows of Parquet files with encoded photos (bytes, or Hugging Face's ``{bytes, path}``) and captions."""

    image: str
    caption: str
    root: Path
    left_out = ()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> Parquet:
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
            image_column = find_column(file, "image", image_column, IMAGE_COLUMNS, columns)
            caption_column = find_column(file, "caption", caption_column, CAPTION_COLUMNS, columns)
        assert image_column is not None and caption_column is not None, f"{path}: no Parquet files"
        return cls(tuple(stretches), image_column, caption_column, path if path.is_dir() else path.parent)

    def __iter__(self) -> Iterator[Pair | Bad]:
        for path, first, last in self.stretches:
            stem = path.relative_to(self.root).with_suffix("").as_posix().replace(".", "_")
            for row, image, caption in self._rows(path, first, last):
                yield _row_sample(path, f"{stem}-{row:08d}", image, caption)

    def _rows(self, path: Path, first: int, last: int) -> Iterator[tuple[int, Any, Any]]:
        """Numbers, photos and captions of the rows first … last - 1; other row groups are not read."""
        table = _pyarrow().ParquetFile(path)
        tops = list(dict.fromkeys(_top(name, table.schema_arrow.names) for name in (self.image, self.caption)))
        row = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows <= first or row >= last:
                row += rows
                continue
            # Small batches: a photo may have megabytes.
            for batch in table.iter_batches(32, row_groups=[group], columns=tops):
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
