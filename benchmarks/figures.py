"""The figures of docs/performance.md and docs/performance/, drawn from rows of a results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixreorg_fast.files import atomic_path

Row = Mapping[str, Any]
SIZE, DPI = (5.6, 3.2), 80
# What the time of an image should do as each of these grows, and so what the dashed line shows.
GROWTH = {
    "batch": "images in a step: the same time for each",
    "resolution": "pixels of a side: in proportion to the area",
    "group size": "images that are mixed with one another: the same time for each",
    "caption length": "tokens of a caption: a straight line",
}


def speed(names: Sequence[str], speeds: Sequence[float], title: str, path: Path) -> None:
    """A bar per name: how many times as fast as the baseline, on a logarithmic axis that starts at the baseline."""
    with _figure(path, height=0.55 * len(names) + 0.9) as (plot,):
        bars = plot.barh(range(len(names)), [value - 1 for value in speeds], left=1, color="#3b7dd8")
        plot.bar_label(bars, [f"{value:.3g}×" for value in speeds], padding=3, fontsize=8)
        plot.set(xscale="log", xlim=(1, 2 * max(speeds)), yticks=range(len(names)), xlabel="times as fast")
        plot.set_yticklabels(names, fontsize=8)
        plot.set_title(title, fontsize=9)
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= 2 * max(speeds)]
        plot.set_xticks(ticks, [f"{tick}×" for tick in ticks])
        plot.minorticks_off()
        plot.invert_yaxis()


def growth(rows: Sequence[Row], path: Path) -> None:
    """Time per image against what grows (`rows` of one axis), with the line that theory expects."""
    rows = sorted(rows, key=lambda row: row["at"])
    axis, at, ms = rows[0]["axis"], [row["at"] for row in rows], [1e3 / row["images_per_s"] for row in rows]
    with _figure(path) as (plot,):
        plot.plot(at, ms, "o-", label="measured")
        plot.plot(at, expected(axis, at, ms), "--", color="gray", label=GROWTH[axis].split(": ")[1])
        plot.set(xlabel=GROWTH[axis].split(": ")[0], ylabel="ms per image", xticks=at, ylim=(0, None))
        plot.set_xticklabels(at)
        plot.legend(fontsize=8)


def expected(axis: str, at: Sequence[float], ms: Sequence[float]) -> list[float]:
    """The points of linear cost: through the last measured one for the resolution, through the first and the last for
    the caption length, else level at the median."""
    if axis == "resolution":
        return [ms[-1] * (x / at[-1]) ** 2 for x in at]
    if axis == "caption length":
        slope = (ms[-1] - ms[0]) / (at[-1] - at[0])
        return [ms[0] + slope * (x - at[0]) for x in at]
    return [sorted(ms)[len(ms) // 2]] * len(at)


def losses(rows: Sequence[Row], path: Path) -> None:
    """Loss curves laid over each other, a panel for each method."""
    methods = list(dict.fromkeys(row["op"] for row in rows))
    with _figure(path, len(methods)) as panels:
        for panel, method in zip(panels, methods, strict=True):
            for row in (row for row in rows if row["op"] == method):
                style = {"linestyle": "-" if row["dtype"] == "float32" else ":", "linewidth": 1}
                panel.plot(row["losses"], label=f"{row['implementation']}, {row['dtype']}", **style)
            panel.set(title=method, xlabel="step")
            panel.legend(fontsize=7)


class _figure:
    """Panels side by side; on leaving, the picture is written."""

    def __init__(self, path: Path, panels: int = 1, height: float = SIZE[1]) -> None:
        from matplotlib.figure import Figure

        self._path = path
        self._figure = Figure((SIZE[0] * (1 if panels == 1 else 0.8 * panels), height), layout="constrained")
        self._panels = self._figure.subplots(1, panels, squeeze=False)[0]

    def __enter__(self):
        for panel in self._panels:
            panel.grid(alpha=0.3)
        return self._panels

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            with atomic_path(self._path) as partial:
                self._figure.savefig(partial, format="png", dpi=DPI)
