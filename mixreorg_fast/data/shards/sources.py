"""What shards are built from: photo files with captions, Parquet files, or the output of img2dataset.

A source is a sized, sliceable iterable of samples. Slices go to processes of their own, so they hold places rather than
photos. Iterating yields a :class:`~.pair.Pair`, or a :class:`~.bad.Bad` in place of a sample that cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...errors import UserError, nearest
from . import photos
from .bad import Bad
from .img2dataset import Img2dataset
from .pair import Pair
from .parquet import Parquet


class Source(Protocol):
    """Samples 0 … ``len(source) - 1``; ``source[first:last]`` is a source too."""

    left_out: tuple[Bad, ...]  # what gives no sample, found when the source was opened

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Source: ...

    def __iter__(self) -> Iterator[Pair | Bad]: ...

    def files(self) -> list[Path]:
        """The files that samples come from. When one of them changes, an interrupted build cannot continue."""
        ...


class Kind(NamedTuple):
    """A kind of source, and the options of :func:`open_source` that it has."""

    description: str
    open: Callable[..., Any]  # returns a Source
    options: tuple[str, ...] = ()


COLUMNS = ("image_column", "caption_column")
TABLE = Kind("a table of photos", photos.listed, ("split", "images", *COLUMNS))
TEXTS = Kind("a folder of photos and text files", photos.beside_texts)
TARS = Kind("a folder of tars (img2dataset's)", Img2dataset.open, ("workers",))
PARQUET = Kind("Parquet", Parquet.open, ("split", *COLUMNS))


def open_source(path: str | Path, *, workers: int = 1, **options: str | Path | None) -> Source:
    """The source at `path`, its kind told by the files there (see docs/data.md).

    Args:
        workers: processes that look through img2dataset's tars.
        options: those of the source's kind that are not None, of

            split: of photos in a table, only those that ``splits/<split>.txt`` lists; of a folder of Parquet files,
            those that are called ``<split>-*.parquet`` or lie in a folder of that name.
            images: the folder of the photos that a table names; None: the table's, or ``images`` in it.
            image_column, caption_column: of a table or Parquet files; None: the usual names are tried.

    Raises:
        UserError: no source lies there, it lacks something, or it has no such option.
    """
    path = Path(path).expanduser()
    kind = _kind(path)
    for name, value in options.items():
        if value is not None and name not in kind.options:
            raise UserError(f"--{name.replace('_', '-')} {value}: not for {path}, which is {kind.description}")
    given = {"workers": workers, **options}
    return kind.open(path, **{name: given[name] for name in kind.options if name in given})


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
