"""Every checked-in kernel configuration, compiled offline: none spills or exceeds the shared memory."""

from __future__ import annotations

import pytest

from mixreorg_fast.info import kernel_resources
from mixreorg_fast.kernels.variants import ARCHITECTURES
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
