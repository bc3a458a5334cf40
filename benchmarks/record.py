"""Note what finished runs scored: ``python -m benchmarks.record RUN_FOLDER...``, then ``python -m benchmarks.report``.

A run's rows go into ``benchmarks/results/study_<device>.json``, one per data set it was scored on, in place of the ones
that the same run left there before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixreorg_fast import ledger
from mixreorg_fast.errors import UserError, run_command

from . import harness


def rows_of(run: Path) -> list[dict[str, Any]]:
    """One row per data set of a run folder.

    Raises:
        UserError: the run did not finish.
    """
    try:
        config = json.loads((run / "config.json").read_text())
        scores = json.loads((run / "eval.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no finished run: {error}") from None
    reports = [line for line in lines if "loss" in line]
    # Steps between two reports take what the later one says they took; the run may have been interrupted.
    images = [b["samples"] - a["samples"] for a, b in zip([{"samples": 0}, *reports], reports, strict=False)]
    seconds = sum(count / line["images_per_s"] for count, line in zip(images, reports, strict=True))
    return [
        {
            "suite": "study",
            "run": config["name"],
            "world": world,
            "variant": config["model"]["method"],
            "seed": config["seed"],
            "budget": "steps",
            "seconds": round(seconds, 1),
            "steps": reports[-1]["step"],
            "images_seen": reports[-1]["samples"],
            "miou": round(score["mIoU"], 2),
            "all_background_miou": round(score["all_background_mIoU"], 2) if "all_background_mIoU" in score else None,
            "oracle_miou": round(score["oracle_mIoU"], 2),
            "groups_used": round(score["groups_used"], 2),
            "images": score["images"],
        }
        for world, score in scores.items()
        if "mIoU" in score
    ]


def record(runs: Sequence[Path], folder: Path = harness.RESULTS) -> Path:
    """Add the rows of `runs` to the device's study file; returns its path."""
    rows = [row for run in runs for row in rows_of(run)]
    path = folder / f"study_{ledger.file_stem(ledger.device_name())}.json"
    names = {row["run"] for row in rows}
    old: list[Mapping[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if row["run"] not in names]
    ledger.write_rows(path, ledger.versions(f"python -m benchmarks.record {' '.join(map(str, runs))}"), [*kept, *rows])
    return path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.record", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    print(record(parser.parse_args(argv).runs))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
