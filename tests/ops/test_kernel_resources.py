"""Real launches, compiled offline: none spills or exceeds the shared memory. Retuning takes the fastest."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from mixreorg_fast.info import kernel_resources
from mixreorg_fast.kernels import variants
from mixreorg_fast.kernels.variants import ARCHITECTURES, Config
from mixreorg_fast.ops.dispatch import TRITON_INSTALLED


@pytest.mark.launch
@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_no_launch_spills():
    """Of the network's launches on a data-centre and a consumer card; `make kernels` checks every op on every card.
    With Triton older than 3.7 a few spill."""
    spills_count = tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
    rows = kernel_resources((90, 120), only="noun prompts")
    kernels = {row["kernel"] for row in rows}
    assert {
        "append_branch_backward",
        "stochastic_depth",
        "grouping_backward",
        "mixed_segmentation_backward",
        "log_sum_exp",
    } <= kernels
    wrong = [row for row in rows if spills_count and row["spill_bytes"] or not row["fits"] or row["faults"]]
    assert not wrong, wrong


# What Triton 3.6.0 made of the grouping attention's backward, in bf16 and fp16.
NARROW = """
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 4], instrShape = [16, 8]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 16, 16]}>
%w = ttg.local_load %a -> tensor<16x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 8}>>
%g = ttg.local_load %b -> tensor<16x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = 4}>>
"""
UNWRITTEN = """
        /*0640*/                   USHF.R.U32.HI UR8, URZ, 0x4, UR12 ;
        /*0700*/                   ULDC.64 UR20, c[0x0][0x260] ;
        /*0710*/                   UMOV UR9, 0x40000040 ;
        /*0720*/                   UMOV UR10, 0x2 ;
        /*0730*/                   UMOV UR11, 0xc0000010 ;
        /*0850*/                   UIADD3 UR22, UP0, UR13, 0x20, URZ ;
        /*33c0*/                   HGMMA.64x16x16.F32 R24, gdesc[UR8].tnspA.tnspB, RZ, !UPT ;
        /*33d0*/                   HGMMA.64x16x16.F32 R24, gdesc[UR20].tnspA.tnspB, R24 ;
"""


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_what_compilers_get_wrong_is_recognised():
    from mixreorg_fast.kernels.miscompilation import faults, unwritten_registers, wide_operands

    (wide,) = wide_operands(NARROW)
    assert "16x16" in wide and "kWidth 8" in wide
    found = [fault.split(" ")[0] + fault[fault.index("reads") :] for fault in unwritten_registers(UNWRITTEN)]
    assert found == [
        "0640reads UR12, which nothing has written",
        "0850reads UR13, which nothing has written",
        "33d0reads UR23, which nothing has written",
    ]
    assert faults("", "") == ()


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
    assert sorted(measured[1:4]) == [16, 32, 64]  # compiled side by side
    assert measured[4:] == [16, 32, 32, 32]  # those that fit are timed, and the best is launched
    assert "kernel sm_90 torch.float32 (1, 2): Config(blocks={'BLOCK': 32}" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "on"), [("", False), ("0", False), ("false", False), ("1", True), ("True", True)])
def test_switches_of_the_environment(text, on, monkeypatch):
    monkeypatch.setenv("MIXREORG_RETUNE", text)
    assert variants.flag("MIXREORG_RETUNE") is on
