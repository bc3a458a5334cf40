"""Real launches, compiled offline: none spills or exceeds the shared memory. Retuning takes the fastest."""

from __future__ import annotations

import pytest
import torch

from mixreorg_fast.info import kernel_resources
from mixreorg_fast.kernels import variants
from mixreorg_fast.kernels.variants import ARCHITECTURES, Config
from mixreorg_fast.ops.dispatch import TRITON_INSTALLED


@pytest.mark.launch
@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_no_launch_spills():
    """Of the network's launches on a data-centre and a consumer card; `make kernels` checks every op on every card."""
    rows = kernel_resources((90, 120), only="noun prompts")
    kernels = {row["kernel"] for row in rows}
    assert {
        "append_branch_backward",
        "stochastic_depth",
        "grouping_backward",
        "mixed_segmentation_backward",
        "log_sum_exp",
    } <= kernels
    greedy = [row for row in rows if row["spill_bytes"] or not row["fits"]]
    assert not greedy, greedy


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_retuning_takes_the_fastest_candidate_once(monkeypatch, capsys):
    from triton.runtime.errors import OutOfResources

    table = dict.fromkeys(ARCHITECTURES, Config({"BLOCK": 16}, num_warps=4))
    milliseconds = {16: 2.0, 32: 1.0, 64: None}
    candidates = [Config({"BLOCK": block}, num_warps=4) for block in milliseconds]
    measured = []

    def do_bench(call, return_mode):
        return call()

    def launch(config):
        measured.append(config.blocks["BLOCK"])
        if config.blocks["BLOCK"] == 64:
            raise OutOfResources(2, 1, "shared memory")
        return milliseconds[config.blocks["BLOCK"]]

    def taken():
        return variants.tuned("kernel", launch, torch.empty(0), table, candidates, (1, 2))

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(variants, "INTERPRET", False)
    monkeypatch.setattr(variants, "_winners", {})
    assert taken() == milliseconds[16]
    assert measured == [16]
    monkeypatch.setattr(variants, "RETUNE", True)
    assert taken() == taken() == milliseconds[32]
    assert measured[1:] == [16, 32, 64, 32, 32]
    assert "kernel sm_90 torch.float32 (1, 2): Config(blocks={'BLOCK': 32}" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "on"), [("", False), ("0", False), ("false", False), ("1", True), ("True", True)])
def test_switches_of_the_environment(text, on, monkeypatch):
    monkeypatch.setenv("MIXREORG_RETUNE", text)
    assert variants.flag("MIXREORG_RETUNE") is on
