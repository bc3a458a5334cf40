"""What tests see of the machine: its GPUs, data and folders must not decide whether a test passes.

Without a GPU, Triton kernels run under its interpreter: chosen here, before anything imports Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# `pytest -n` shares the processors: what a worker starts inherits its threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

# What chooses a device by itself takes the CPU, also in the ranks and commands that tests start: there may be fewer
# GPUs than ranks. A test computes on a GPU by the fixture `device` or the marker `gpu`.
os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that start processes are the longest: they come first, so that no worker is left with one at the end.
    long = {item.path for item in items if "launch" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in an empty folder, so that none finds the data or the runs of this checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    yield
    os.chdir(before)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this session: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def gpu_memory(device: torch.device):
    """``gpu_memory(gib)`` skips where the GPU has less free memory."""

    def require(gib: float) -> None:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} are free")

    yield require
    torch.cuda.empty_cache()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A local Hugging Face hub (tests/servers/hub.py), to which this process and those it starts are sent.

    The client's cache lies in ``tmp_path / "home"``; ``hub.pauses`` holds the pauses that it would have made.
    """
    from .servers.hub import redirect_client, serving

    with serving() as server:
        server.pauses = redirect_client(monkeypatch, server, tmp_path / "home")
        yield server


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN (integers: their lowest value), so an element that is not written shows."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.dtype == torch.bool or out.numel() == 0:
                return out
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return allocated

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
