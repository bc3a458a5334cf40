"""Photo files as a source of samples: listed by a table, or each beside a text file with its captions."""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from .pair import Pair, checked
from .scan import IMAGE_EXTENSIONS, Bad
from .sources import CAPTION_COLUMNS, Source, find_column

# What the table of a folder may be called. The first needs no header, and quotes mean nothing in it.
TABLES = ("captions.tsv", "captions.csv", "captions.txt")
PLAIN = TABLES[0]
# Names of columns, in any case.
FILE_COLUMNS = ("image", "file_name", "filename", "filepath", "image_path", "image_name", "path", "file", "photo")


def table_of(path: Path) -> Path | None:
    """The table that `path` is, or that lies in the folder `path`."""
    if path.is_dir():
        return next((path / name for name in TABLES if (path / name).is_file()), None)
    return path if path.suffix.lower() in (".csv", ".tsv", ".txt") else None


def beside_texts(root: Path) -> Source:
    """The photos of a folder and its subfolders that have a text file of the same name, in alphabetical order."""
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    stems = {name: os.path.splitext(name)[0] for name in sorted(os.path.relpath(path, root) for path in paths)}
    photos, texts = {name for name in stems if is_photo(name)}, {name for name in stems if name.endswith(".txt")}
    alone = {name: "file name is not UTF-8" for name in stems if not _is_text([name])}
    for files, others, lack in ((photos, texts, "no .txt"), (texts, photos, "no photo")):
        matched = {stems[name] for name in others}
        alone |= {name: f"{lack} of the same name" for name in files if stems[name] not in matched}
    items = [(name, None) for name in stems if name in photos and name not in alone]
    # A folder's time changes when a file comes or goes.
    folders = [root / folder for folder in sorted({os.path.dirname(name) for name, _ in items})]
    left_out = [Bad(str(root), name, alone[name]) for name in sorted(alone)]
    return Source(items, partial(_read, root, root), folders, left_out)


def listed(
    path: Path,
    split: str | None = None,
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """The photos that a table names, with the captions of all of their lines, in the order of their first lines.

    docs/data.md tells which tables are understood ("Tables"); the most frequent separator of the first line is taken.

    Args:
        path: the table, or its folder.
        split: only the photos whose stems are the lines of ``splits/<split>.txt`` beside the table.
        images: the folder of photos; None: the table's, or ``images`` in it.
        image_column, caption_column: names in the header; None: the usual ones.

    Raises:
        UserError: the table is empty or not text, or has no such columns; there is no such split, or no photo of it
            has a caption.
    """
    table = table_of(path) or path
    captions, left_out = _read_table(table, (image_column, caption_column))
    if split is not None:
        stems = _read_split(table.parent, split)
        captions = {name: texts for name, texts in captions.items() if Path(name).stem in stems}
        if not captions:
            raise UserError(f"{table}: no photo of split '{split}' has a caption; its lines should be stems of photos")
    usual = [table.parent / "images", table.parent / "Images", table.parent]
    root = _folder_of(captions, usual if images is None else [Path(images)])
    inside = os.path.join(os.path.abspath(root), "")
    away = [name for name in captions if not os.path.normpath(os.path.join(inside, name)).startswith(inside)]
    for name in away:
        left_out.append(Bad(str(table), name, f"leads out of {root}, the folder of photos (--images names another)"))
        del captions[name]
    return Source(list(captions.items()), partial(_read, root, table), [table], left_out)


def key_of(name: str | Path) -> str:
    """The key of a photo's sample, from its name in the folder: a dot in a key would end it early."""
    return Path(name).with_suffix("").as_posix().replace(".", "_")


def is_photo(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS


def _read(root: Path, source: Path, items: Sequence[tuple[str, Sequence[str] | None]]) -> Iterator[Pair | Bad]:
    """The photos by their names in `root`, with captions; None: they are the lines of the text file beside it."""
    for name, captions in items:
        photo = root / name
        try:
            image = photo.read_bytes()
            text = photo.with_suffix(".txt").read_bytes() if captions is None else "\n".join(captions).encode()
        except FileNotFoundError:
            yield Bad(str(source), name, f"no such photo in {root}")
        except OSError as error:
            yield Bad(str(source), name, f"cannot be read: {error.strerror}")
        else:
            pair = checked(source, key_of(os.path.relpath(photo, root)), image, text)
            yield pair if isinstance(pair, Pair) else pair._replace(key=name)


def _read_table(path: Path, columns: tuple[str | None, str | None]) -> tuple[dict[str, list[str]], list[Bad]]:
    """Captions by photo, and the lines that lack a photo or a caption; `columns` of both, as for :func:`listed`."""
    plain = path.name == PLAIN
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    delimiter = "\t" if plain or not lines else max("\t,;|", key=lines[0].count)
    places: tuple[int, int] | None = None
    captions: dict[str, list[str]] = {}
    left_out: list[Bad] = []
    rows = _rows(lines, delimiter, csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    for row, (number, cells, problem) in enumerate(rows):
        if row == 0 and problem and not plain:
            raise UserError(f"{path}: line {number}: {problem}; expected the names of columns")
        if row == 0 and not problem and (places := _places(path, cells, columns)):
            continue
        if places is None:
            cells = [cells[0], delimiter.join(cells[1:])]
        name, caption = (cells[place] if place < len(cells) else "" for place in places or (0, 1))
        name, caption = name.strip(), " ".join(caption.split())
        if not problem and not (name and caption):
            problem = f"no {'caption' if name else 'photo'} in this line"
        if problem:
            left_out.append(Bad(str(path), f"line {number}", problem))
        else:
            captions.setdefault(name, []).append(caption)
    if not captions and not left_out:
        raise UserError(f"{path}: empty; expected a photo and a caption per line")
    return captions, left_out


def _rows(lines: Sequence[str], delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str], str]]:
    """Each row that is not blank: number of its first line, cells, and the problem with them ("" if none).

    After a line with an error (such as a quote that is not closed) reading continues with the next line.
    """
    at = 0
    while at < len(lines):
        rest = (lines[number] for number in range(at, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, quoting=quoting, strict=True)
        first = at
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield first + 1, cells, "" if _is_text(cells) else "not UTF-8"
                first = at + reader.line_num
            return
        except csv.Error as error:
            yield first + 1, [""], f"malformed: {error}"
            at = first + 1


def _places(path: Path, first: Sequence[str], columns: tuple[str | None, str | None]) -> tuple[int, int] | None:
    """Which columns hold photos and captions, by the header; None where the `first` line is not a header."""
    names = [name.strip() for name in first]
    lower = {name.lower() for name in names}
    if columns[0] is None and lower & {"url", "image_url"} and not lower & set(FILE_COLUMNS):
        raise UserError(
            f"{path}: its photos are on the web (there are: {', '.join(names)}); download them with img2dataset and "
            f"build from its output, or name a column of files with --image-column"
        )
    try:
        image = find_column(path, "image", columns[0], FILE_COLUMNS, names)
        caption = find_column(path, "caption", columns[1], CAPTION_COLUMNS, names)
    except UserError:
        if any(columns) or not (path.name == PLAIN or is_photo(names[0])):
            raise
        return None
    return names.index(image), names.index(caption)


def _folder_of(names: Iterable[str], folders: Sequence[Path]) -> Path:
    """The first of `folders` in which one of the first hundred photos lies, else the first that exists."""
    some = list(itertools.islice(names, 100))
    holds = (folder for folder in folders if any((folder / name).is_file() for name in some))
    return next(holds, next(filter(Path.is_dir, folders), folders[-1]))


def _read_split(folder: Path, split: str) -> set[str]:
    path = folder / "splits" / f"{split}.txt"
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except OSError:
        splits = [p.stem for p in sorted((folder / "splits").glob("*.txt"))]
        raise UserError(f"no split file {path}{nearest(split, splits)}") from None


def _is_text(cells: Iterable[str]) -> bool:
    """Whether the cells were UTF-8: other bytes were read as surrogates."""
    return not re.search("[\ud800-\udfff]", "".join(cells))
