"""Fixtures shared by the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .fakes import FakeModel, draw_mask, draw_photo


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny; on a busy machine a team of threads waits for its members longer than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().eval()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Seven photos of three sizes, four classes with background, some pixels ignored."""
    root = tmp_path / "shapes"
    names = [f"photo{i}" for i in range(7)]
    for i, name in enumerate(names):
        size = [(64, 48), (50, 61), (64, 48)][i % 3]
        draw_photo(root / "images" / f"{name}.jpg", size, seed=i)
        draw_mask(root / "masks" / f"{name}.png", size, [0, 1, 2, 3, 255], seed=i)
    (root / "classes.txt").write_text("background\ncat\ndog\nred car\n")
    (root / "splits").mkdir()
    (root / "splits" / "val.txt").write_text("\n".join(names) + "\n")
    return root
