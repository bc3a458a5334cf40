"""``losses.png``: the measures of a run over its steps; and curves over steps in general."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import atomic_path
from .reports import read_metrics

Curve = Sequence[tuple[int, float]]  # steps and values
# Name in metrics.jsonl -> title of its panel. Panels without numbers are left out.
PANELS = {
    "loss": "loss (weighted sum)",
    "loss_original": "original: contrastive loss",
    "loss_restored": "restored: contrastive loss",
    "loss_mixed": "mixed: segmentation loss",
    "loss_multi_label": "noun prompts: contrastive loss",
    "groups_used": "final segments in use per image",
    "temperature": "logit scale",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
COLUMNS = 4


def draw_losses(run: Path) -> Path | None:
    """Draw the whole ``metrics.jsonl`` of a run folder as ``losses.png``; returns as :func:`draw_panels`."""
    reports = read_metrics(run)
    curves = {name: [(r["step"], r[name]) for r in reports if r.get(name) is not None] for name in PANELS}
    panels = {PANELS[name]: {"": curve} for name, curve in curves.items() if curve}
    return draw_panels(run / "losses.png", panels, title=run.name, logarithmic=PANELS["grad_norm"])


def draw_panels(
    path: Path, panels: Mapping[str, Mapping[str, Curve]], *, title: str = "", logarithmic: str = ""
) -> Path | None:
    """Draw `panels` (title -> label -> curve) as a PNG; returns its path, or None without matplotlib.

    The first panel holds the legend; `logarithmic` is the title of the panel whose vertical axis is logarithmic.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(3.4 * COLUMNS, 2.5 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (heading, curves) in zip(axes, panels.items(), strict=False):
        for label, curve in curves.items():
            steps, values = [step for step, _ in curve], [value for _, value in curve]
            # An empty curve takes its colour, so that colours agree between panels, but no entry in the legend.
            marker = "." if len(curve) < 30 else ""
            axis.plot(steps, values, linewidth=1.2, marker=marker, label=label if curve else "_")
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if heading == logarithmic:
            axis.set_yscale("log")
    if any(label for curves in panels.values() for label in curves):
        axes[0].legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return path
