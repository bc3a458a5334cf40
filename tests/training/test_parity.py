"""Data parallelism changes nothing: every engine against one process with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .parity_worker import RESUMED, cases

pytestmark = pytest.mark.launch

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]


def launched(tmp_path_factory, ranks: int) -> dict:
    out = tmp_path_factory.mktemp("parity") / "deviations.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    command = [*launch, "tests.training.parity_worker", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    return launched(tmp_path_factory, 2)


@pytest.mark.parametrize("case", cases(2), ids=lambda case: case["name"])
def test_two_ranks_equal_one(deviations, case):
    check(case, deviations[case["name"]])


def test_four_ranks_equal_one(tmp_path_factory):
    measured = launched(tmp_path_factory, 4)
    for case in cases(4):
        check(case, measured[case["name"]])


def check(case: dict, measured: dict) -> None:
    if case["precision"] == "bf16":  # whose noise is how far one process is from itself in fp32
        assert measured["gradient"] < 1.5 * measured["noise"], measured
        return
    assert measured["loss"] < 1e-5, measured
    assert measured["gradient"] < 1e-5, measured
    assert measured["buffer"] < 1e-6, measured


@pytest.mark.parametrize(("name", "other"), RESUMED)
def test_checkpoint_loads_into_the_same_and_another_stage(deviations, name, other):
    measured = deviations[f"{name} to {other}"]
    assert measured["loaded"]  # weights and moments, bit for bit, in both
    assert measured["exact"]  # the same stage resumes bit for bit
    assert measured["deviation"] < 1e-3, measured  # another sums the gradients' norm in another order
