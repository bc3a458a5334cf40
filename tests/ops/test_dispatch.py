"""The choice of an implementation: capability as data, refusal with every reason, nothing imported too early."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixreorg_fast import ops
from mixreorg_fast.ops import dispatch
from mixreorg_fast.ops.dispatch import CannotRun, UnknownImplementation, autocast, choose, triton_reasons


def test_auto_takes_the_first_that_can_run():
    assert choose("op", "auto", {"fast": list, "slow": list}) == "fast"
    assert choose("op", "auto", {"fast": lambda: ["too big"], "slow": list}) == "slow"
    assert choose("op", "slow", {"fast": list, "slow": list}) == "slow"


def test_refusals_name_the_inputs_and_every_reason():
    inputs = (torch.zeros(2, 3), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(CannotRun) as error:
        choose("op", "fast", {"fast": lambda: ["too big", "too odd"], "slow": list}, inputs)
    text = "op: impl='fast' cannot run on float32 [2, 3] on cpu, int32 [4] on cpu: too big; too odd"
    assert str(error.value) == text
    assert error.value.reasons == ["too big", "too odd"]
    with pytest.raises(CannotRun, match="no implementation .*: fast: too big; slow: too odd"):
        choose("op", "auto", {"fast": lambda: ["too big"], "slow": lambda: ["too odd"]}, inputs)


def test_an_unknown_implementation_is_told_the_known_ones():
    with pytest.raises(UnknownImplementation, match="op: impl must be 'auto' or one of 'fast', 'slow', got 'cuda'"):
        choose("op", "cuda", {"fast": list, "slow": list})


def test_auto_never_takes_the_interpreter():
    inputs = (torch.zeros(2),)
    assert choose("op", "auto", {"triton": list, "torch": list}, inputs) == "torch"
    assert choose("op", "triton", {"triton": list, "torch": list}, inputs) == "triton"


def test_triton_reasons(monkeypatch):
    monkeypatch.setattr(dispatch.variants, "INTERPRET", False)
    assert triton_reasons(torch.zeros(2)) == ["tensors on cpu, Triton needs CUDA"]
    monkeypatch.setattr(dispatch.variants, "INTERPRET", True)
    assert triton_reasons(torch.zeros(2), torch.zeros(2, dtype=torch.int64)) == []
    meta = torch.zeros(2, device="meta", dtype=torch.float64)
    assert triton_reasons(torch.zeros(2), meta) == [
        "tensors on several devices (cpu, meta)",
        "dtype torch.float64, expected float32, bfloat16 or float16",
    ]
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert triton_reasons(torch.zeros(2)) == ["Triton is not installed"]


def test_autocast_casts_floats_only():
    x, index, double = torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float64)
    assert autocast(x, index) == (x, index)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [tensor.dtype for tensor in autocast(x, index, double)]
    assert dtypes == [torch.bfloat16, torch.int32, torch.float64]  # fp64 stays, as in PyTorch's matmuls


@pytest.fixture
def small_gpu(monkeypatch):
    """``small_gpu(launcher)``: tensors count as a GPU's, and this launcher of the mixing kernels wants too much."""
    triton = pytest.importorskip("triton")
    from mixreorg_fast.kernels import patch_mixing as mixing

    def refuse(*arguments):
        raise triton.runtime.errors.OutOfResources(200_000, 101_376, "shared memory")

    monkeypatch.setattr(dispatch, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(dispatch, "_without_resources", {})
    monkeypatch.setattr(dispatch, "_tried", set())
    return lambda launcher: monkeypatch.setattr(mixing, launcher, refuse)


def blended(device, impl="auto", run=lambda function, *inputs: function(*inputs)):
    plan = ops.MixPlan.sample(4, 3, 2, seed=1, device=device, impl="torch")
    numbers = torch.arange(48.0, device=device).view(4, 3, 4)
    mixed, original = (numbers.mul(n).requires_grad_() for n in (1, 2))
    out = run(lambda a, b: ops.patch_blend(a, b, plan, 0.25, impl=impl), mixed, original)
    return [out, *torch.autograd.grad(out, (mixed, original), torch.ones_like(out))]


@pytest.mark.parametrize("launcher", ["blend_forward", "blend_backward"])
def test_auto_leaves_a_kernel_that_has_no_resources(launcher, small_gpu, monkeypatch, caplog, device):
    expected = blended(device, "torch")
    small_gpu(launcher)
    for _ in range(2):
        for got, truth in zip(blended(device), expected, strict=True):
            assert torch.equal(got, truth)
    where = torch.zeros(1, device=device).device  # with its number
    (record,) = caplog.records  # once, in one line
    start = f"patch_blend: the kernel cannot run on {where}, PyTorch takes over: out of resource"
    assert record.message.startswith(start)
    assert "200000" in record.message and "\n" not in record.message
    plan = ops.MixPlan.sample(4, 3, 2, seed=1, device=device, impl="torch")
    reference = "mixreorg_fast.ops.patch_mixing.patch_mix_reference"
    monkeypatch.setattr(reference, lambda *inputs: pytest.fail("PyTorch was taken"))
    ops.patch_mix(torch.zeros(4, 3, 4, device=device), plan)  # other ops keep their kernels


def test_a_forced_kernel_without_resources_is_refused(small_gpu, device):
    small_gpu("blend_forward")
    reason = "patch_blend: impl='triton' cannot run on float32 .* out of resource: shared memory, Required: 200000"
    with pytest.raises(CannotRun, match=reason):
        blended(device, "triton")


def test_backward_is_tried_once_and_not_while_activations_are_recomputed(small_gpu, monkeypatch, device):
    from mixreorg_fast.kernels import patch_mixing as mixing

    calls = []
    backward = mixing.blend_backward
    monkeypatch.setattr(mixing, "blend_backward", lambda *inputs: calls.append(1) or backward(*inputs))
    blended(device, run=lambda *call: checkpoint(*call, use_reentrant=False))
    assert len(calls) == 1
    blended(device)
    assert len(calls) == 3
    blended(device)
    assert len(calls) == 4


def test_backward_is_tried_for_keyword_arguments_and_for_each_size_of_mixing_groups(small_gpu, monkeypatch, device):
    from mixreorg_fast.kernels import patch_mixing as mixing

    calls = []
    backward = mixing.blend_backward
    monkeypatch.setattr(mixing, "blend_backward", lambda *inputs: calls.append(1) or backward(*inputs))
    mixed, original = (torch.ones(4, 3, 4, device=device, requires_grad=True) for _ in range(2))
    for group_size in (2, 2, 4):
        plan = ops.MixPlan.sample(4, 3, group_size, seed=1, device=device, impl="torch")
        ops.patch_blend(mixed=mixed, original=original, plan=plan, alpha=0.25)
    assert len(calls) == 2


def test_trying_backward_stays_within_the_op(small_gpu, device):
    """If one input is computed from another, backward does not run through what lies between them."""
    plan = ops.MixPlan.sample(4, 3, 2, seed=1, device=device, impl="torch")
    original = torch.ones(4, 3, 4, device=device, requires_grad=True)
    mixed, between = original * 2, []
    mixed.register_hook(between.append)
    ops.patch_blend(mixed, original, plan, 0.25).sum()
    assert not between


BARE = """
import sys

for name in ("triton", "xformers", "nvidia", "deepspeed", "transformers", "pydantic", "tokenizers", "safetensors"):
    sys.modules[name] = None  # as if it were not installed

import torch

def asked(*arguments, **keywords):
    raise AssertionError("a device was asked at import")

torch.cuda.is_available = torch.cuda.get_device_properties = torch.cuda.device_count = asked
import mixreorg_fast
from mixreorg_fast import ops

plan = ops.MixPlan.sample(4, 5, 2)
x = torch.randn(4, 5, 3)
assert torch.equal(ops.patch_restore(ops.patch_mix(x, plan), plan), x)
try:
    ops.patch_mix(x, plan, impl="triton")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.launch
def test_the_package_needs_torch_and_nothing_else():
    result = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Triton is not installed" in result.stdout


@pytest.mark.launch
def test_importing_the_ops_does_not_import_triton():
    code = "import sys; from mixreorg_fast import ops; assert 'triton' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
