"""The texts of a sample: its captions, and the nouns that the multi-label loss asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError

# Bytes of a line. A longer line is a document rather than a caption: text encoders read less than 1 % of it.
LONGEST_CAPTION = 8192


def captions_of(text: bytes) -> list[str]:
    """The captions of a ``.txt``, one per line, without the lines that cannot be used.

    Raises:
        ValueError: no line can be used; the message says why.
    """
    usable, reason = [], "empty caption"
    for line in text.splitlines():
        try:
            caption = line.decode().strip()
        except UnicodeDecodeError:
            reason = "caption is not UTF-8"
            continue
        if len(line) > LONGEST_CAPTION:
            reason = f"caption of {len(line)} bytes, more than {LONGEST_CAPTION}"
        elif caption:
            usable.append(caption)
    if not usable:
        raise ValueError(reason)
    return usable


def nouns_of(text: bytes) -> list[str]:
    """The ``nouns`` of a sample's json; empty where there is no list of texts."""
    try:
        nouns = json.loads(text)["nouns"] if text else []
    except (ValueError, KeyError, TypeError):
        return []
    nouns = nouns if isinstance(nouns, list) else []
    return [noun for noun in nouns if isinstance(noun, str) and len(noun) <= LONGEST_CAPTION]


class NounFinder:
    """Finds the words and phrases of a list in captions, in singular or a plural in -s or -es; longer ones first."""

    def __init__(self, nouns: Sequence[str]) -> None:
        self.nouns = nouns
        choices = "|".join(re.escape(noun) for noun in sorted(set(nouns), key=lambda n: (-len(n), n)))
        self._pattern = re.compile(rf"\b({choices})(?:e?s)?\b")

    @classmethod
    def of(cls, path: str | Path) -> NounFinder:
        """A finder of the lines of a file, lower-cased.

        Raises:
            UserError: the file is missing or empty.
        """
        try:
            nouns = [line.strip().lower() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise UserError(f"no readable noun list {path}; expected one word or phrase per line") from None
        if not any(nouns):
            raise UserError(f"{path}: empty; expected one word or phrase per line")
        return cls([noun for noun in nouns if noun])

    def find(self, captions: Sequence[str]) -> list[str]:
        """The nouns in the captions, each once, in order of appearance."""
        return list(dict.fromkeys(noun for caption in captions for noun in self._pattern.findall(caption.lower())))
