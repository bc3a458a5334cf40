"""Linear layers through oneDNN: values and gradients against fp64, strides, and where it is not taken."""

from __future__ import annotations

import importlib
import time

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mixreorg_fast import ops
from mixreorg_fast.ops.dispatch import CannotRun

from .tolerances import assert_close_to_truth

module = importlib.import_module("mixreorg_fast.ops.linear")  # the package has a function of that name


def make(*shape: int, width: int = 100):
    generator = torch.Generator().manual_seed(0)
    sizes = ((*shape, width), (13, width), (13,))
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def everything(function, inputs, grad):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 17)])
@pytest.mark.parametrize("view", ["plain", "transposed", "sliced"])
def test_values_and_gradients(shape, view):
    x, weight, bias = make(*shape)
    if view == "transposed":  # tokens last in memory, as the MLP across tokens has them
        x = x.detach().mT.contiguous().mT.requires_grad_()
    elif view == "sliced":
        x = x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    grad = torch.randn(*shape, 13, generator=torch.Generator().manual_seed(1))
    found = everything(lambda *a: ops.linear(*a, impl="onednn"), (x, weight, bias), grad)
    plain = everything(F.linear, (x, weight, bias), grad)
    truth = everything(F.linear, [t.detach().double().requires_grad_() for t in (x, weight, bias)], grad)
    for result, baseline, exact in zip(found, plain, truth, strict=True):
        assert_close_to_truth(result, baseline, exact, torch.float32)


def test_without_bias_and_with_frozen_weights():
    x, weight, _ = make(5)
    out = ops.linear(x, weight.detach(), impl="onednn")
    torch.testing.assert_close(out, F.linear(x, weight))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("wins", [False, True])
def test_the_choice(wins, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "onednn_wins", lambda threads: wins)
    monkeypatch.setattr(module, "_product", lambda x, weight, bias=None: calls.append(x) or F.linear(x, weight, bias))
    x, weight, bias = (t.detach() for t in make(5))
    for inputs, taken in (((x, weight, bias), wins), ([t.bfloat16() for t in (x, weight, bias)], False)):
        calls.clear()
        ops.linear(*inputs)
        assert bool(calls) == taken
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
    assert ops.linear(x[:0], weight, bias).shape == (0, 13)
    assert not calls


@pytest.mark.parametrize(("slow", "wins"), [("_product", False), ("linear", True)])
def test_the_faster_library_is_measured_once_for_each_number_of_threads(slow, wins, monkeypatch):
    calls = []

    def product(name: str):
        def call(x, weight, bias=None):
            assert type(x) is torch.Tensor and x.device.type == "cpu"
            calls.append(name)
            time.sleep(0.002 * (name == slow))
            return torch.empty(len(x), len(weight))

        return call

    monkeypatch.setattr(module, "_product", product("_product"))
    monkeypatch.setattr(module.F, "linear", product("linear"))
    module.onednn_wins.cache_clear()
    state = torch.get_rng_state()
    try:
        with FakeTensorMode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            found = [module.onednn_wins(threads) for threads in (1, 1, 2)]
    finally:
        module.onednn_wins.cache_clear()
    assert found == [wins] * 3
    assert len(calls) == 2 * 2 * (1 + module.REPEATS)
    assert torch.equal(torch.get_rng_state(), state)


def test_torch_compile_chooses_by_itself(monkeypatch):
    monkeypatch.setattr(module, "onednn_wins", lambda threads: True)
    monkeypatch.setattr(module, "_product", None)
    inputs = make(5)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), F.linear(*inputs))


def test_refusals_name_their_reasons():
    x, weight, bias = (t.bfloat16() for t in make(5))
    with pytest.raises(CannotRun, match=r"linear: impl='onednn' cannot run on bfloat16 \[5, 100\].*expected float32"):
        ops.linear(x, weight, bias, impl="onednn")
    with pytest.raises(CannotRun, match="tensors on meta, oneDNN computes on a CPU only"):
        ops.linear(*(t.to("meta") for t in make(5)), impl="onednn")


def test_the_result_may_be_changed_in_place():
    x, weight, bias = make(2, 3)
    out = ops.linear(x, weight, bias, impl="onednn")
    out += 1
    torch.testing.assert_close(out, F.linear(x, weight, bias) + 1)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), bias)[0], torch.full((13,), 6.0))
