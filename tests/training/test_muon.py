"""Muon's update: orthogonal, the same for any number of ranks, and only of weight matrices."""

from types import SimpleNamespace

import pytest
import torch

from mixreorg_fast.errors import UserError
from mixreorg_fast.files import write_json
from mixreorg_fast.models import MixReorg
from mixreorg_fast.training import checkpoint, muon
from mixreorg_fast.training.optimisation import StepGuard, optimizer
from tests.tiny import fill, tiny_config

SHAPES = [(12, 6), (6, 12), (8, 8), (12, 6), (5, 48)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_near_one(shape, dtype):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    found = muon.orthogonalised(matrices, dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.3 and values.max() < 1.3  # a square random matrix has singular values near 0
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(found.float().flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.95


def test_a_matrix_without_gradients_stays():
    assert muon.orthogonalised(torch.zeros(1, 4, 6), torch.float32).eq(0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_hold_the_parts_of_the_whole(monkeypatch, ranks):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    offsets, flat = [], torch.empty(0)
    for matrix in matrices:
        offsets.append(len(flat))
        flat = torch.cat([flat, matrix.flatten(), torch.zeros(3)])  # DeepSpeed aligns them
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % ranks))
    layout = muon.Flat(SimpleNamespace(round_robin_bit16_groups=[matrices], round_robin_bit16_offsets=[offsets]))
    monkeypatch.setattr(muon, "all_gather", lambda part: flat)
    found = []
    for number, part in enumerate(flat.chunk(ranks)):
        monkeypatch.setattr(muon, "rank", lambda number=number: number)
        found.append(layout.directions(part, torch.float32))
    whole = torch.cat(found)
    for offset, direction in zip(offsets, muon.directions(matrices, torch.float32), strict=True):
        torch.testing.assert_close(whole[offset : offset + direction.numel()].view_as(direction), direction)


def stepped(name: str, guard: StepGuard | None = None) -> tuple[dict, dict]:
    """Parameters before and after one step from random gradients."""
    config = tiny_config(train={"optimizer": name, "weight_decay": 0.0, "lr": 0.01})
    model = MixReorg(config)
    fill(model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer(model, config, guard).step()
    return before, dict(model.named_parameters())


def test_weight_matrices_take_muons_step_and_the_rest_adams():
    before, after = stepped("muon")
    _, adams = stepped("adamw")
    others = [key for key in before if torch.equal(after[key], adams[key])]
    assert len(others) not in (0, len(before))
    for key, value in after.items():
        matrix = value.dim() >= 2 and not key.endswith(("tokens.weight", "positions.weight")) and "embedding" not in key
        assert (key not in others) == matrix, key
        if matrix:
            size = (value - before[key]).square().mean().sqrt()
            rows, columns = value.flatten(1).shape
            expected = 0.01 * muon.ADAMS_SIZE * (max(rows, columns) * min(rows, columns) / value.numel()) ** 0.5
            assert 0.6 * expected < size < 1.2 * expected, key  # as Adam's, in learning rates


def test_a_refused_step_changes_nothing():
    guard = StepGuard(1.0)
    guard.refuses_now = lambda: True
    before, after = stepped("muon", guard)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_optimizer_does_not_resume_the_run(tmp_path):
    content = {"step": 1, "optimizer": "muon", "files": {}}
    write_json(tmp_path / checkpoint.STATE, {**content, "sha256": checkpoint._digest_of(content)})
    assert checkpoint.read_state(tmp_path, {"optimizer": "muon"})["step"] == 1
    with pytest.raises(UserError, match="was written with optimizer muon; this run has optimizer adamw"):
        checkpoint.read_state(tmp_path, {"optimizer": "adamw"})


@pytest.mark.parametrize("deepspeed", [{"zero_stage": 3}, {"zero_stage": 2, "offload_optimizer": True}])
def test_muon_needs_whole_gradients(deepspeed):
    with pytest.raises(UserError, match="optimizer muon needs deepspeed.zero_stage 0, 1 or 2"):
        tiny_config(train={"optimizer": "muon"}, deepspeed=deepspeed)
