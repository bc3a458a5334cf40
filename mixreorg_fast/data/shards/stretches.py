"""Sources whose samples are numbered places in a few large files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

# Samples of a file: the first, and the last + 1.
Stretch = tuple[Path, int, int]


@dataclass(frozen=True)
class Stretches:
    """Stretches of files, counted through; a slice of them goes to a process of its own."""

    stretches: tuple[Stretch, ...]

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.stretches)

    def __getitem__(self, part: slice) -> Stretches:
        first, last, _ = part.indices(len(self))
        kept, before = [], 0
        for path, start, stop in self.stretches:
            begin, end = max(first - before, 0), min(last - before, stop - start)
            if begin < end:
                kept.append((path, start + begin, start + end))
            before += stop - start
        return replace(self, stretches=tuple(kept))

    def files(self) -> list[Path]:
        return [path for path, _, _ in self.stretches]
