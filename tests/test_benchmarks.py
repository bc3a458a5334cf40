"""The benchmarks' bookkeeping: what a results file keeps, what the page of tables says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import activations, contrastive_memory, figures, harness, launches, memory, report
from benchmarks import test_curves as curves
from benchmarks import test_profile as profile
from benchmarks import test_train_step as train_step
from benchmarks.harness import Case, Work
from mixreorg_fast.ledger import BEGIN, END, between_markers
from tests import markdown

COUNTED_ON_A_CPU = pytest.mark.skipif(harness.ON_GPU, reason="counted on a CPU, under Triton's interpreter")
TINY = {"small": True, "image_size": 32}
CONFIG = train_step.configuration("mixreorg", torch.float32, **TINY)
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
    title, text = report.pages(tmp_path)["performance/some_gpu_80_gb.md"]
    assert title == "Some GPU (80 GB)"
    found = markdown.row(text, shape="8x9x10", dtype="bfloat16", mode="fwd, graph")
    assert [found[f"{name} ms"].split()[0] for name in ("eager", "compiled", "triton")] == ["2", "1", "0.5"]
    assert (found["vs eager"], found["vs compiled"], found["of the limit"]) == ("4.00×", "2.00×", "50%")
    assert (found["peak MB"], found["eager's"]) == ("3", "3")
    page = f"before {BEGIN} old {END} after"
    assert between_markers(page, text) == f"before {BEGIN}\n\n{text}\n\n{END} after"


def test_steps_are_told_in_images_per_second(tmp_path):
    step = {**row("groupvit step", suite="step"), "mode": "step", "graph": False, "images_per_s": 40.0}
    rows = [{**step, "implementation": "huggingface"}, {**step, "implementation": "ours", "median_ms": 1.6}]
    largest = {"suite": "step", "op": "largest batch", "shape": "mixreorg", "dtype": "bfloat16", "images": 640}
    rows.append({**largest, "implementation": "ours", "peak_mb": 1234.5, "commit": "abc"})
    harness.write_results(rows, HEADER, tmp_path)
    found = report.pages(tmp_path)
    text = found["performance/some_gpu_80_gb.md"][1]
    theirs, ours = (markdown.row(text, implementation=name) for name in ("huggingface", "ours"))
    assert (theirs["images/s"], theirs["ms"], theirs["ours against it"]) == ("40", "2 (2–2)", "1.25×")
    assert (ours["ms"], ours["ours against it"], ours["of the limit"]) == ("1.6 (2–2)", "", "50%")
    assert markdown.row(text, model="mixreorg")["images"] == "640"
    opening = markdown.row(found["performance.md"][1], what="GroupViT training step, bfloat16")
    assert (opening["baseline"], opening["speed-up"]) == ("transformers", "1.25×")
    report.draw(tmp_path, tmp_path)
    assert f"(images/{report.speed_name(HEADER)})" in found["performance.md"][1]
    assert 0 < (tmp_path / report.speed_name(HEADER)).stat().st_size < 100_000


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


def test_a_case_starts_without_the_graphs_of_others():
    """Else the second shape would have a symbolic graph, and be slower than what users have."""
    symbolic = []

    def backend(graph, inputs):
        symbolic.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    class Benchmark:
        stats = None

        def pedantic(self, function, rounds, iterations):
            function()

    compiled = torch.compile(lambda x: 2 * x, backend=backend)
    for size in (4, 8):
        inputs = lambda generator, size=size: (torch.randn(size, generator=generator),)  # noqa: E731
        case = Case("op", str(size), 1, inputs, {"ours": compiled}, {}, modes=("fwd",))
        for _ in range(2):  # a case's modes share its graphs
            assert harness.run_case(Benchmark(), case, "ours", "fwd", False) is None
    assert symbolic == [False, False]


@pytest.mark.slow
@COUNTED_ON_A_CPU
def test_launches_outside_of_compiled_parts():
    counts = launches.micro_step("groupvit", depths=[2, 1, 1]).counts
    assert counts["stage 1"]["compiled"] == 3 and not counts["stage 1"]["eager"]  # what comes before its two blocks
    # Seeds, winners, the branches' parts; embeddings and their layout; the contrastive loss and the sums of losses.
    most = {"stages 2 and 3": 8, "features": 0, "captions": 7, "losses": 15, "backward": 36}
    assert all(counts[region]["eager"] <= number for region, number in most.items()), counts
    assert counts["losses"]["compiled"] == 2 and counts["losses"]["triton"] > 0


@pytest.mark.slow
@COUNTED_ON_A_CPU
def test_activations_grow_with_the_images():
    sizes = {"image_size": 64, "width": 48, "heads": 2, "depths": (3, 1, 1), "groups": (8, 4), "projection_hidden": 64}
    compiled, eager = (activations.configuration("mixreorg", compile, **sizes) for compile in (True, False))
    few, more, most = (activations.bytes_kept(eager, images) for images in (4, 8, 12))
    assert {part: more[part] - few[part] for part in few} == {part: most[part] - more[part] for part in few}
    per_image = activations.bytes_per_image(compiled)
    assert 0 < 4 * per_image["encoders"] < more["encoders"] - few["encoders"]
    assert 4 * per_image["features"] == more["features"] - few["features"]


def test_peak_memory_is_that_of_the_call():
    device = "cuda" if harness.ON_GPU else "cpu"
    memory.peak_bytes(lambda: torch.ones(2**25, device=device))  # an earlier peak does not count
    assert 0.9 < memory.peak_bytes(lambda: torch.ones(2**23, device=device)) / 2**25 < 1.5
    measured = contrastive_memory.measure(1024, 2, 16, torch.float32)
    assert measured["global"] == 2048 and measured["peak_mb"] > 0.5  # the weights of a block of logits alone take more


def test_figures_and_gaps(tmp_path):
    growing = [
        {**row("mixreorg step by batch", "ours", suite="step"), "mode": "step", "axis": "batch", "at": at}
        | {"images_per_s": 100.0, "shape": f"{at} images"}
        for at in (8, 16)
    ]
    losses = [
        {**row("mixreorg loss", name, suite="curves"), "dtype": dtype, "losses": [2.0, 1.0 + shift]}
        for name, dtype, shift in (("eager", "float32", 0), ("eager", "bfloat16", 0.2), ("ours", "float32", 0.1))
    ]
    harness.write_results([*growing, *losses], HEADER, tmp_path)
    text = report.pages(tmp_path)["performance/some_gpu_80_gb.md"][1]
    report.draw(tmp_path, tmp_path)
    for what in ("batch", "losses"):
        name = f"step_{what}_some_gpu_80_gb.png"
        assert f"(../images/{name})" in text
        assert 0 < (tmp_path / name).stat().st_size < 100_000
    assert markdown.row(text, between="ours in float32 and eager in float32")["gap"] == "0.071"
    assert markdown.row(text, between="eager in bfloat16 and eager in float32")["gap"] == "0.14"
    assert figures.expected("resolution", [1, 2], [3.0, 8.0]) == [2.0, 8.0]
    assert figures.expected("caption length", [1, 2, 3], [1.0, 9.0, 3.0]) == [1.0, 2.0, 3.0]
    assert figures.expected("batch", [1, 2, 3], [1.0, 9.0, 3.0]) == [3.0] * 3


def test_profile_and_waiting_tables(tmp_path):
    part = {"gflop": 6.0, "gbyte": 0.1, "floor_ms": 1.0, "step_ms": 5.0, "commit": "abc"}
    families = [
        {**part, "suite": "profile", "op": "mixreorg step, by family", "shape": "4", "dtype": "float32"}
        | {"implementation": "ours", "family": family, "ms": 2.0, "share": 0.5}
        for family in ("attention", "optimizer")
    ]
    step = {**row("mixreorg step", "ours", suite="step"), "mode": "step", "images_per_s": 100.0}
    loader = {**row("loader", "ours", suite="loader"), "mode": "step", "images_per_s": 250.0}
    waiting = {**loader, "op": "waiting for data", "waiting": 0.0123, "images_per_s": 99.0}
    harness.write_results([*families, step, loader, waiting], HEADER, tmp_path)
    text = report.pages(tmp_path)["performance/some_gpu_80_gb.md"][1]
    columns = ("ms", "share", "GFLOP", "GB", "floor ms", "of the limit")
    attention, whole = (markdown.row(text, family=name) for name in ("attention", "the step, by the clock"))
    assert [attention[column] for column in columns] == ["2", "50.0%", "6", "0.1", "1", "50%"]
    assert [whole[column] for column in columns] == ["5", "100.0%", "12", "0.2", "2", "40%"]
    waited = markdown.row(text, training="8x9x10")
    assert [waited[column] for column in ("waiting", "loader alone", "step alone", "ratio")] == [
        "1.2%",
        "250",
        "100",
        "2.5×",
    ]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("_grouping_forward_kernel", "fused ops"),
        ("mixreorg::patch_mix", "fused ops"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::native_layer_norm_backward", "normalisation"),
        ("void at::native::multi_tensor_apply_kernel<...>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
        ("aten::copy_", "copies and indexing"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and indexing"),
        ("aten::gelu_backward", "elementwise and sums"),
        ("triton_poi_fused_gelu_3", "elementwise and sums"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "host and other"),
    ],
)
def test_families_of_operations(name, family):
    assert profile.family(name) == family


@pytest.mark.slow
def test_a_profile_of_both_steps():
    found = [row for name in ("eager", "ours") for row in profile.rows("mixreorg", name, 4, steps=1, **TINY)]
    ours = {row["family"]: row for row in found if row["implementation"] == "ours"}
    assert {"attention", "matrix products", "normalisation", "optimizer"} <= ours.keys()
    for row in ours.values():
        assert row["ms"] > 0 and row["floor_ms"] >= 0
    assert sum(row["share"] for row in ours.values()) == pytest.approx(1.0)
    batch = train_step.random_batch(CONFIG, 4, (5, 5), torch.Generator(harness.DEVICE).manual_seed(0))
    total = sum(profile.count(CONFIG, batch).flops.values())
    # Backward of attention computes the logits once more than the counter's way without flash attention.
    counted = train_step.Counted(CONFIG, 8, (5, 5))["step"].flops / 2
    assert total == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
def test_losses_of_all_implementations_agree(monkeypatch):
    monkeypatch.setattr(curves, "SIZES", TINY)
    monkeypatch.setattr(curves, "IMAGES", 4)
    for method, baseline in curves.BASELINES.items():
        first, second = (curves.losses(method, name, torch.float32, steps=3) for name in (baseline, "ours"))
        assert first[0] == pytest.approx(second[0], rel=3e-5)  # of five digits
        assert first == pytest.approx(second, rel=1e-3)  # Adam's first steps divide rounding by rounding
        assert len(set(first)) == 3


@pytest.mark.launch
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_host_time_is_measured_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host_time", "--only", "blend_tokens"]
    root = harness.RESULTS.parents[1]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row.pop("op") == "blend_tokens"
    assert all(0 < value < 1e5 for value in row.values()) and len(row) == 4


def test_docs_are_written_only_when_asked_for(monkeypatch, tmp_path):
    """A session of benchmarks leaves its rows and no more."""
    from benchmarks import conftest, harness, report

    written = []
    monkeypatch.setattr(harness, "write_results", lambda rows, header: written.append(rows) or tmp_path / "x.json")
    monkeypatch.setattr(harness, "header", dict)
    monkeypatch.setattr(report, "main", lambda argv: pytest.fail("docs were written"))
    said = []
    writer = SimpleNamespace(line=said.append)
    config = SimpleNamespace(stash={conftest._rows: [{}]}, get_terminal_writer=lambda: writer)
    conftest.pytest_sessionfinish(SimpleNamespace(config=config))
    assert written == [[{}]] and "python -m benchmarks.report" in said[0]
