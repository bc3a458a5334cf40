"""Note what finished runs scored: ``python -m benchmarks.record RUN_FOLDER...``, then ``python -m benchmarks.report``.

A run's rows go into ``benchmarks/results/study_<device>.json``, one per dataset it was scored on, in place of the ones
that the same run left there before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mixreorg_fast.errors import run_command
from mixreorg_fast.study.report import results_file, rows_of, write_study_rows

from . import harness


def record(runs: Sequence[Path], folder: Path = harness.RESULTS) -> Path:
    """Add the rows of `runs` to the device's study file; returns its path."""
    path = results_file(folder)
    rows = [row for run in runs for row in rows_of(run)]
    write_study_rows(rows, path, f"python -m benchmarks.record {' '.join(map(str, runs))}")
    return path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.record", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    print(record(parser.parse_args(argv).runs))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
