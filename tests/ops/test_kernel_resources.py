"""Every checked-in kernel configuration, compiled offline: none spills or exceeds the shared memory."""

from __future__ import annotations

import pytest
import torch

from mixreorg_fast.info import kernel_resources
from mixreorg_fast.kernels import variants
from mixreorg_fast.kernels.variants import ARCHITECTURES, Config
from mixreorg_fast.ops.dispatch import TRITON_INSTALLED

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # the most that one block may take (227 KB; A100: 163 KB)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_no_configuration_spills():
    rows = kernel_resources((80, 90))
    assert {row["architecture"] for row in rows} < set(ARCHITECTURES)
    families = {row["name"].split(".")[0].split("[")[0] for row in rows}
    assert {"mixing", "decoding"} <= families
    spilling = [row for row in rows if row["spill_bytes"]]
    assert not spilling, spilling
    greedy = [row for row in rows if row["shared_bytes"] > SHARED_BYTES[row["architecture"]]]
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

    def chosen():
        return variants.configuration("kernel", table, torch.device("cpu"), (1, 2), candidates, launch)

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(variants, "INTERPRET", False)
    monkeypatch.setattr(variants, "_winners", {})
    for off in ("", "0", "false"):
        monkeypatch.setenv("MIXREORG_RETUNE", off)
        assert chosen() == table[90]
    assert not measured
    monkeypatch.setenv("MIXREORG_RETUNE", "1")
    assert chosen() == chosen() == candidates[1]
    assert measured == [16, 32, 64]
    assert "kernel sm_90 (1, 2): Config(blocks={'BLOCK': 32}" in capsys.readouterr().err
