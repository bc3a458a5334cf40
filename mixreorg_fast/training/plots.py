"""``losses.png``: the measures of a run over its steps."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import atomic_path

# Name in metrics.jsonl -> title of its panel. Panels without numbers are left out.
PANELS = {
    "loss": "loss (weighted sum)",
    "loss_original": "original: contrastive loss",
    "loss_restored": "restored: contrastive loss",
    "loss_mixed": "mixed: segmentation loss",
    "loss_multi_label": "noun prompts: contrastive loss",
    "groups_used": "final segments in use per image",
    "temperature": "temperature (multiplier of cosines)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
COLUMNS = 4


def draw_losses(run: Path) -> Path | None:
    """Draw the whole ``metrics.jsonl`` of a run folder as ``losses.png``.

    Returns:
        The picture's path; None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = {name: [(r["step"], r[name]) for r in reports if r.get(name) is not None] for name in PANELS}
    curves = {name: curve for name, curve in curves.items() if curve}
    rows = max(1, -(-len(curves) // COLUMNS))
    figure = Figure(figsize=(3.4 * COLUMNS, 2.5 * rows + 0.5), layout="constrained")
    figure.suptitle(run.name)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        axis.plot(*zip(*curve, strict=True), linewidth=1.2, marker="." if len(curve) < 30 else "")
        axis.set_title(PANELS[name], fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if name == "grad_norm":
            axis.set_yscale("log")
    path = run / "losses.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return path
