"""What shards are built from, in the form that every kind of source takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from .pair import Pair
from .scan import Bad

# Usual names of the column of captions, in any case.
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "title", "comment")


@dataclass(frozen=True)
class Source:
    """Samples of photo files, of Parquet files, or of tars.

    Attributes:
        places: where the samples are. Slices of it go to processes of their own, so it holds no photos.
        read: from a slice of `places` to its samples, a :class:`Bad` in place of each that cannot be used.
        files: where the samples come from. When one of them changes, an interrupted build cannot continue.
        left_out: what gives no sample, found when the source was opened.
    """

    places: Sequence[Any] | Stretches
    read: Callable[[Any], Iterator[Pair | Bad]]
    files: Sequence[Path]
    left_out: Sequence[Bad] = ()


@dataclass(frozen=True)
class Stretches:
    """Numbered places in a few large files, counted through."""

    parts: Sequence[tuple[Path, range]]

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self.parts)

    def __getitem__(self, part: slice) -> Stretches:
        first, last, _ = part.indices(len(self))
        kept, before = [], 0
        for path, numbers in self.parts:
            chosen = numbers[max(first - before, 0) : max(last - before, 0)]
            kept += [(path, chosen)] if chosen else []
            before += len(numbers)
        return Stretches(kept)


def find_column(
    file: Path, what: str, asked: str | None, usual: Sequence[str], there: Sequence[str], option: str | None = None
) -> str:
    """The column of a table that is `asked` for, else the first of the `usual` names, in any case.

    Where no column of `there` fits, a :class:`UserError` asks for the `option`, by default --`what`-column.
    """
    if asked is not None:
        if asked not in there:
            raise UserError(f"{file}: no column '{asked}'{nearest(asked, there)}")
        return asked
    fitting = [column for name in usual for column in there if column.lower() == name]
    if not fitting:
        raise UserError(
            f"{file}: which column is the {what}? name it with {option or f'--{what}-column'} "
            f"(there are: {', '.join(there)}); usual names are {', '.join(usual)}"
        )
    return fitting[0]
