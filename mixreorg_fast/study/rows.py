"""Scores of finished runs as rows of a results file (``study_<device>.json``)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import ledger
from ..errors import UserError
from ..training.reports import read_metrics

Row = dict[str, Any]
FIGURES = {  # column -> name in eval.json
    "miou": "mIoU",
    "frequent_miou": "frequent_mIoU",
    "all_background_miou": "all_background_mIoU",
    "oracle_miou": "oracle_mIoU",
    "groups_used": "groups_used",
}


def training_seconds(reports: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a run's steps without evaluations, from its reports.

    The later of two reports gives the time of the steps between them, since the run may have been interrupted.
    """
    images = [b["samples"] - a["samples"] for a, b in zip([{"samples": 0}, *reports], reports, strict=False)]
    return sum(count / line["images_per_s"] for count, line in zip(images, reports, strict=True))


def rows_of(run: Path, **about: Any) -> list[Row]:
    """One row per data set of a run folder; `about` overrides or adds columns.

    Raises:
        UserError: the run did not finish.
    """
    try:
        config = json.loads((run / "config.json").read_text())
        scores = json.loads((run / "eval.json").read_text())
        reports = [line for line in read_metrics(run) if "loss" in line]
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a finished run: {error}") from None
    described = {
        "suite": "study",
        "run": config["name"],
        "variant": config["model"]["method"],
        "seed": config["seed"],
        "budget": "steps",
        "seconds": round(training_seconds(reports), 1),
        "steps": reports[-1]["step"],
        "images_seen": reports[-1]["samples"],
        **about,
    }
    rows = []
    for dataset, score in scores.items():
        if "mIoU" in score:
            figures = {column: round(score[name], 2) if name in score else None for column, name in FIGURES.items()}
            rows.append({**described, "world": dataset, **figures, "images": score["images"]})
    return rows


def results_file(folder: Path) -> Path:
    """The results file of this device."""
    return folder / f"study_{ledger.file_stem(ledger.device_name())}.json"


def write_study_rows(
    rows: Iterable[Row], path: Path, command: str, runs: Mapping[str, Collection[tuple[str, str]]] | None = None
) -> None:
    """Put `rows` into the results file `path`. They replace the rows of the same runs; other rows stay.

    Args:
        runs: for each study, the data set and name of the runs that its file lists. Rows of its other runs are dropped.
    """
    rows = list(rows)
    replaced = {_run(row) for row in rows}

    def stays(row: ledger.Row) -> bool:
        listed = (runs or {}).get(str(row.get("study")))
        return _run(row) not in replaced and (listed is None or (row["trained_on"], row["run"]) in listed)

    ledger.write_rows(path, ledger.versions(command), rows, stays)


def _run(row: ledger.Row) -> tuple:
    return (row.get("study"), row.get("trained_on"), row["run"])
