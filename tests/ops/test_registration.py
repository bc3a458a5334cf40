"""A kernel is a plain function where nothing traces, and a custom op where something does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixreorg_fast import ops
from mixreorg_fast.kernels.settings import Grouping
from mixreorg_fast.ops import MixPlan


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def inputs(device) -> tuple[Tensor, MixPlan]:
    x = torch.randn(4, 3, 16, device=device, requires_grad=True)
    return x, MixPlan.sample(4, 3, 2, seed=1, device=device)


def test_eager_calls_pass_the_dispatcher_by(inputs, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the custom op was called")

    monkeypatch.setattr(ops.patch_mixing._patch_gather, "op", refuse)
    x, plan = inputs
    out = ops.patch_mix(x, plan, impl="triton")
    assert torch.equal(out, ops.patch_mix(x, plan, impl="torch"))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(grad, 2 * x)


def test_eager_calls_inspect_no_signature(inputs, monkeypatch):
    """PyTorch's Function.apply inspects one if there is a setup_context: a fifth of an op's host time."""
    x, plan = inputs
    monkeypatch.setattr("inspect.signature", lambda *_: pytest.fail("a signature was inspected"))
    out = ops.patch_mixing._patch_gather(x, plan.source, plan.inverse)
    torch.autograd.grad(out.sum(), x)


def test_what_traces_meets_the_custom_op(inputs):
    x, plan = inputs
    with Recorded() as recorded:
        out = ops.patch_mix(x, plan, impl="triton")
        torch.autograd.grad(out.sum(), x)
    assert recorded.names.count("mixreorg.patch_gather.default") == 2  # forward, and backward by the inverse


def test_the_custom_op_takes_the_fields_of_settings():
    arguments = torch.ops.mixreorg.grouping_attention.default._schema.arguments
    assert [argument.name for argument in arguments] == ["q", "k", "v", "seed", *Grouping._fields]


def test_functorch_differentiates_it(inputs):
    x, plan = inputs
    grad = torch.func.grad(lambda y: ops.patch_mix(y, plan, impl="triton").square().sum())(x.detach())
    torch.testing.assert_close(grad, 2 * x.detach())
