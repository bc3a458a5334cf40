"""Collects the rows of a session and writes them to benchmarks/results/ at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixreorg_fast import ledger

from . import harness

_rows = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest):
    """``measure(case, implementation, mode, graph)``: time one combination and keep its row."""

    def run(case: harness.Case, implementation: str, mode: harness.Mode, graph: bool) -> None:
        try:
            row = harness.run_case(benchmark, case, implementation, mode, graph)
        except torch.OutOfMemoryError:
            pytest.skip("out of memory")
        if row is not None:
            request.config.stash[_rows].append(row)

    yield run
    if harness.ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark):
    """``record(suite=…, op=…, …)``: a row without a time. ``record.once(function)`` runs a function once.

    Only with pytest-benchmark's fixture does a test belong to ``--benchmark-only``.
    """

    def add(**row: Any) -> None:
        stamped = {**row, "date": ledger.now(), "commit": ledger.commit()}
        request.config.stash[_rows].append({key: harness.rounded(value) for key, value in stamped.items()})

    add.once = lambda function: benchmark.pedantic(function, rounds=1, iterations=1)
    return add


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[_rows]
    if rows:
        path = harness.write_results(rows, harness.header())
        line = f"{len(rows)} rows written to {path}; python -m benchmarks.report writes the tables of docs/"
        session.config.get_terminal_writer().line(f"\n{line}")
