"""The benchmarks' bookkeeping: what a results file keeps, what the page of tables says."""

from __future__ import annotations

import json

import torch

from benchmarks import harness, report
from benchmarks.harness import Case, Work
from mixreorg_fast.ledger import BEGIN, END, between_markers

HEADER = {
    "device": "Some GPU (80 GB)",
    "date": "2026-01-02T03:04:05+00:00",
    "torch": "2",
    "triton": "3",
    "cuda": "13.0",
    "copy_gb_per_s": 100.0,
    "write_gb_per_s": 90.0,
    "matmul_bf16_tflop_per_s": 1.0,
    "matmul_fp32_tflop_per_s": 0.5,
}


def row(op="patch_mix", implementation="eager", median=2.0, suite="op"):
    return {
        "suite": suite,
        "op": op,
        "shape": "8x9x10",
        "dtype": "bfloat16",
        "mode": "fwd",
        "implementation": implementation,
        "graph": True,
        "median_ms": median,
        "p20_ms": median,
        "p80_ms": median,
        "peak_mb": 3.0,
        "limit_fraction": 0.5,
        "commit": "abc",
    }


def test_a_session_replaces_the_rows_of_its_own_ops_only(tmp_path):
    harness.write_results([row(), row("patch_blend"), row(suite="step")], HEADER, tmp_path)
    path = harness.write_results([row(median=1.0)], HEADER, tmp_path)
    assert path.name == "some_gpu_80_gb.json"
    content = json.loads(path.read_text())
    assert content["device"] == HEADER["device"]
    kept = {(row["suite"], row["op"]): row["median_ms"] for row in content["rows"]}
    assert kept == {("op", "patch_blend"): 2.0, ("step", "patch_mix"): 2.0, ("op", "patch_mix"): 1.0}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_tables_are_made_of_the_results(tmp_path):
    rows = [row(), row(implementation="compiled", median=1.0), row(implementation="triton", median=0.5)]
    harness.write_results(rows, HEADER, tmp_path)
    text = report.tables(tmp_path)
    assert "### Some GPU (80 GB)" in text
    assert (
        "| 8x9x10 | bfloat16 | fwd, graph | 2 (2–2) | 1 (1–1) | 0.5 (0.5–0.5) | 4.00× | 2.00× | 50% | 3 | 3 |" in text
    )
    page = f"before {BEGIN} old {END} after"
    assert between_markers(page, text) == f"before {BEGIN}\n\n{text}\n\n{END} after"


def test_steps_are_told_in_images_per_second(tmp_path):
    step = {**row("groupvit step", suite="step"), "mode": "step", "graph": False, "images_per_s": 40.0}
    rows = [{**step, "implementation": "huggingface"}, {**step, "implementation": "ours", "median_ms": 1.6}]
    largest = {"suite": "step", "op": "largest batch", "shape": "mixreorg", "dtype": "bfloat16", "images": 640}
    rows.append({**largest, "implementation": "ours", "peak_mb": 1234.5, "commit": "abc"})
    harness.write_results(rows, HEADER, tmp_path)
    text = report.tables(tmp_path)
    assert "| 8x9x10 | bfloat16 | huggingface | 40 | 2 (2–2) | 1.25× | 3 | 50% |" in text
    assert "| 8x9x10 | bfloat16 | ours | 40 | 1.6 (2–2) |  | 3 | 50% |" in text
    assert "| mixreorg | bfloat16 | 640 | 1234 |" in text


def test_calls_rotate_through_the_input_sets_and_time_what_they_say():
    seen = []

    def function(x):
        seen.append(x.item())
        return 3 * x

    case = Case("op", "1", 1, lambda generator: (), {"eager": function}, {"fwd": Work(8)})
    assert str(case) == "op-1"
    sets = [(torch.tensor(value, requires_grad=True),) for value in (1.0, 2.0)]
    step = harness._rotating([harness._call(function, inputs, "fwd") for inputs in sets])
    for _ in range(4):
        step()
    assert seen == [1.0, 2.0, 1.0, 2.0]
    for mode, forwards in (("bwd", 0), ("fwd+bwd", 1)):
        call = harness._call(function, sets[0], mode)
        seen.clear()
        assert call() == (torch.tensor(3.0),)
        assert len(seen) == forwards
