"""Writing shards from a folder of photos and captions, and verifying the photos of finished ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError, nearest
from .shards import (
    IMAGE_EXTENSIONS,
    LARGEST_PHOTO,
    expand,
    index_places,
    scan,
    write_atomically,
    write_index,
)

OPEN_RANGE = re.compile(r"\{(\d+)\.\.\}")


@dataclass(frozen=True)
class Pair:
    """A sample to be written: an encoded photo with its captions and, optionally, further fields."""

    key: str
    image: bytes
    extension: str
    captions: Sequence[str]
    fields: dict | None = None  # the sample's .json


def write_shard(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one tar; it appears under its name when it is whole."""

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for pair in pairs:
                _append(tar, pair)

    write_atomically(path, write)


class ShardWriter:
    """Writes numbered tars that appear under their names together, when the ``with`` block ends without an error.

    Args:
        pattern: such as ``train-{000000..}.tar``; the braces give the first number and its digits.
        samples_per_shard: the last shard may hold fewer.
        overwrite: replace the shards that the pattern has already, all of them.

    Raises:
        UserError: the pattern has no open range, or shards of it exist already.
    """

    def __init__(self, pattern: str, *, samples_per_shard: int = 10_000, overwrite: bool = False) -> None:
        self._number, self._digits, self._before, self._after = _open_range(pattern)
        self._per_shard = samples_per_shard
        folder, name = os.path.split(self._before)
        shape = re.compile(re.escape(name) + rf"\d{{{self._digits},}}" + re.escape(self._after))
        folder = Path(folder or ".")
        self._old = [p for p in folder.iterdir() if shape.fullmatch(p.name)] if folder.is_dir() else []
        if self._old and not overwrite:
            raise UserError(
                f"{min(self._old)} exists already ({len(self._old)} shards of {pattern}); "
                f"add --overwrite to replace them, or choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._written: dict[Path, Path] = {}  # temporary -> final
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, pair: Pair) -> None:
        """Append one sample."""
        if self._tar is None or self._in_shard == self._per_shard:
            self._next()
        _append(self._tar, pair)
        self._in_shard += 1

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            if self._tar is not None:
                self._tar.close()
            if kind is None:
                for path in self._old:
                    path.unlink()
                    for place in index_places(path):
                        with contextlib.suppress(OSError):
                            place.unlink()
                for temporary, path in self._written.items():
                    os.replace(temporary, path)
        finally:
            for temporary in self._written:
                temporary.unlink(missing_ok=True)

    @property
    def paths(self) -> list[Path]:
        """The shards written so far, under their final names."""
        return list(self._written.values())

    def _next(self) -> None:
        if self._tar is not None:
            self._tar.close()
        path = Path(f"{self._before}{self._number + len(self._written):0{self._digits}d}{self._after}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._written[temporary] = path
        self._tar = tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115, closed in __exit__
        self._in_shard = 0


def build(
    folder: str | Path,
    out: str,
    *,
    split: str | None = None,
    nouns: str | Path | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Shards of a folder with ``captions.tsv`` (photo TAB caption, a photo may have several lines) and ``images/``.

    One sample per photo, in the order of captions.tsv, all its captions in the ``.txt``, one per line.

    Args:
        split: only the photos whose stems ``splits/<split>.txt`` lists.
        nouns: a file with one word or phrase per line; those found in a photo's captions become its ``nouns``.

    Returns:
        The shards written.

    Raises:
        UserError: a file is missing or malformed, a photo of captions.tsv does not exist, nothing is left to write,
            or shards of `out` exist already.
    """
    folder = Path(folder)
    captions = read_captions(folder)
    if split is not None:
        stems = _read_split(folder, split)
        captions = {name: texts for name, texts in captions.items() if Path(name).stem in stems}
    if not captions:
        raise UserError(
            f"{folder}: no photo of split '{split}' has a caption; its lines should be stems of captions.tsv"
        )
    finder = None if nouns is None else NounFinder(read_nouns(nouns))
    images = folder / "images" if (folder / "images").is_dir() else folder
    with ShardWriter(out, samples_per_shard=samples_per_shard, overwrite=overwrite) as writer:
        for name, texts in tqdm(captions.items(), unit="photo", desc="build", disable=not progress):
            path = images / name
            extension = path.suffix[1:].lower()
            if extension not in IMAGE_EXTENSIONS:
                raise UserError(f"{path}: photos must be {', '.join('.' + e for e in IMAGE_EXTENSIONS)}")
            try:
                image = path.read_bytes()
            except OSError:
                raise UserError(f"{folder / 'captions.tsv'} names {name}, but there is no readable {path}") from None
            # A dot in a key would end it early.
            key = Path(name).with_suffix("").as_posix().replace(".", "_")
            fields = None if finder is None else {"nouns": finder.find(texts)}
            writer.add(Pair(key, image, extension, texts, fields))
    return writer.paths


def read_captions(folder: Path) -> dict[str, list[str]]:
    """``captions.tsv`` as photo -> captions, in the order of the file.

    Raises:
        UserError: the file is missing, or a line is not ``photo TAB caption``.
    """
    path = Path(folder) / "captions.tsv"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"no {path}; expected lines of photo TAB caption") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, caption = line.rstrip("\r").partition("\t")
        if not tab or not name.strip() or not caption.strip():
            raise UserError(f"{path}: line {number}: expected photo TAB caption, got '{line[:60]}'")
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{path}: line {number}: '{name}' leads out of the folder of photos")
        captions.setdefault(name.strip(), []).append(caption.strip())
    if not captions:
        raise UserError(f"{path}: empty; expected lines of photo TAB caption")
    return captions


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

    def __init__(self, nouns: Iterable[str]) -> None:
        choices = "|".join(re.escape(noun) for noun in sorted(set(nouns), key=lambda n: (-len(n), n)))
        self._pattern = re.compile(rf"\b({choices})(?:e?s)?\b")

    def find(self, captions: Iterable[str]) -> list[str]:
        """The nouns in the captions, each once, in order of appearance."""
        return list(dict.fromkeys(noun for caption in captions for noun in self._pattern.findall(caption.lower())))


def verify(
    patterns: str | Sequence[str], *, workers: int = 1, progress: bool = True
) -> Iterator[tuple[Path, int, dict]]:
    """Decode every photo of the shards; index the sound samples of each and list the broken ones.

    For each shard the index is rewritten without its broken samples, so that the loader never meets them, and
    ``SHARD.broken.tsv`` (key TAB reason) is written, or removed where there are none.

    Yields:
        path, number of sound samples, broken samples (key -> reason); one shard after the other.

    Raises:
        UserError: as :func:`~mixreorg_fast.data.shards.expand`; a file is no tar.
    """
    paths = expand(patterns)
    # Started afresh rather than forked: the caller may have threads.
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else contextlib.nullcontext() as pool:
        checks = pool.map(verify_shard, paths) if pool else map(verify_shard, paths)
        for path, (sound, broken) in tqdm(
            zip(paths, checks, strict=True), total=len(paths), unit="shard", desc="verify", disable=not progress
        ):
            yield path, sound, broken


def verify_shard(path: Path) -> tuple[int, dict[str, str]]:
    """:func:`verify` for one shard; a cut tar has an entry for its lost end under the key ``""``."""
    status = os.stat(path)
    samples, problem = scan(path)
    sound, broken = [], {}
    with open(path, "rb") as file:
        for sample in samples:

            def member(name: str, sample: dict = sample) -> bytes:
                file.seek(sample["start"] + sample[f"{name}_at"])
                return file.read(sample[f"{name}_size"])

            reason = photo_problem(member("image"))
            if reason is None and not member("text").strip():
                reason = "empty caption"
            if reason is None:
                sound.append(sample)
            else:
                broken[sample["key"].decode(errors="replace")] = reason
    write_index(path, status, sound, verified=True, problem=problem)
    report = Path(f"{path}.broken.tsv")
    if problem:
        broken[""] = f"the tar is {problem}"
    if broken:
        text = "".join(f"{key}\t{reason}\n" for key, reason in broken.items())
        with contextlib.suppress(OSError):  # a read-only folder; the command prints the list as well
            write_atomically(report, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    else:
        with contextlib.suppress(OSError):
            report.unlink(missing_ok=True)
    return len(sound), broken


def photo_problem(photo: bytes) -> str | None:
    """Why an encoded photo cannot be decoded whole, or None."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(photo), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size
                if width * height > LARGEST_PHOTO:
                    return f"{width} x {height} pixels, more than {LARGEST_PHOTO}"
                image.convert("RGB")
    except Image.UnidentifiedImageError:
        return "not a JPEG, PNG or WebP image"
    except Exception as error:  # decoders raise whatever they like on damaged files
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _append(tar: tarfile.TarFile, pair: Pair) -> None:
    text = "\n".join(" ".join(caption.split()) for caption in pair.captions)
    members = {pair.extension: pair.image, "txt": text.encode()}
    if pair.fields is not None:
        members["json"] = json.dumps(pair.fields, ensure_ascii=False).encode()
    for extension, data in members.items():
        # No times, owners or modes of this machine: the same samples give the same bytes.
        info = tarfile.TarInfo(f"{pair.key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _read_split(folder: Path, split: str) -> set[str]:
    path = folder / "splits" / f"{split}.txt"
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    except OSError:
        splits = [p.stem for p in sorted((folder / "splits").glob("*.txt"))]
        raise UserError(f"no split file {path}{nearest(split, splits)}") from None


def _open_range(pattern: str) -> tuple[int, int, str, str]:
    """First number, digits, and what stands before and after the open range of an output pattern."""
    ranges = list(OPEN_RANGE.finditer(pattern))
    if len(ranges) != 1 or "/" in pattern[ranges[0].end() :]:
        raise UserError(
            f"--out {pattern}: expected one open range in the file name, such as 'data/train-{{000000..}}.tar'"
        )
    digits = ranges[0][1]
    before, after = pattern[: ranges[0].start()], pattern[ranges[0].end() :]
    if not after.endswith(".tar"):
        raise UserError(f"--out {pattern}: expected a name that ends in .tar, such as 'data/train-{{000000..}}.tar'")
    return int(digits), len(digits), os.path.expanduser(before), after
