"""Patch mixing, restoration and blending: both implementations against the definition."""

from __future__ import annotations

import pytest
import torch

from mixreorg_fast import ops
from mixreorg_fast.ops import patch_mixing as mixing
from mixreorg_fast.ops.patch_mixing import MixPlan, patch_blend_reference, patch_mix_reference

from .tolerances import assert_close_to_truth

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # batch, patches, channels, group size
    (8, 196, 64, 4),  # the model's patches: not a multiple of a block of rows
    (6, 7, 100, 3),  # primes; channels that no large power of two divides
    (1, 5, 384, 1),  # one image, the model's width: the identity
    (7, 1, 8, 7),  # one patch; a group size that is a prime
    (2, 3, 1, 2),  # one channel
]


def make(shape, dtype, device):
    """Two feature tensors and a plan. The first is a view into a wider tensor, as in the model."""
    batch, patches, channels, group_size = shape
    plan = MixPlan.sample(batch, patches, group_size, generator=torch.Generator(device).manual_seed(1))
    generator = torch.Generator(device).manual_seed(2)
    mixed, original = torch.randn(2, batch, patches + 3, channels, device=device, generator=generator).to(dtype)
    return mixed[:, :patches], original[:, :patches].contiguous(), plan


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mix_and_restore_move_every_element_exactly(shape, dtype, impl, device, poisoned_memory):
    x, grad, plan = make(shape, dtype, device)
    x.requires_grad_()
    mixed = ops.patch_mix(x, plan, impl=impl)
    expected = patch_mix_reference(x, plan.source)
    assert torch.equal(mixed, expected)
    assert torch.equal(ops.patch_restore(mixed, plan, impl=impl), x)
    (got,) = torch.autograd.grad(mixed, x, grad)
    (truth,) = torch.autograd.grad(expected, x, grad)
    assert torch.equal(got, truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_blend_is_as_exact_as_pytorch(shape, dtype, impl, device, poisoned_memory):
    mixed, original, plan = make(shape, dtype, device)
    grad = torch.randn_like(original)

    def run(function, to):
        inputs = [x.detach().to(to).requires_grad_() for x in (mixed, original)]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(to))]

    results = run(lambda m, o: ops.patch_blend(m, o, plan, 0.3, impl=impl), dtype)
    baselines = run(lambda m, o: patch_blend_reference(m, o, plan.source, 0.3), dtype)
    truths = run(lambda m, o: patch_blend_reference(m, o, plan.source, 0.3), torch.float64)
    for result, baseline, truth in zip(results, baselines, truths, strict=True):
        assert_close_to_truth(result, baseline, truth, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_are_read_in_place_or_copied(impl, device):
    x, other, plan = make((4, 6, 32, 2), torch.float32, device)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels lie apart
    expanded = x[:1].expand(4, -1, -1)  # images share memory
    for view in (apart, expanded):
        assert torch.equal(ops.patch_mix(view, plan, impl=impl), patch_mix_reference(view, plan.source))
        torch.testing.assert_close(
            ops.patch_blend(view, other, plan, 0.5, impl=impl), patch_blend_reference(view, other, plan.source, 0.5)
        )
    y = apart.clone().requires_grad_()
    ops.patch_mix(y, plan, impl=impl).sum().backward()  # the gradient is one expanded number
    assert torch.equal(y.grad, torch.ones_like(y))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    mixed, original, plan = make((2, 3, 4, 2), torch.float32, device)

    def gradients(function):
        inputs = [x.detach().clone().requires_grad_() for x in (mixed, original)]
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    results = gradients(lambda m, o: ops.patch_blend(m, ops.patch_mix(o, plan, impl=impl), plan, 0.3, impl=impl))
    truths = gradients(lambda m, o: patch_blend_reference(m, patch_mix_reference(o, plan.source), plan.source, 0.3))
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth)


def test_gradcheck_of_the_references(device):
    mixed, original, plan = make((2, 3, 4, 2), torch.float64, device)
    inputs = (mixed.clone().requires_grad_(), original.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, o: ops.patch_blend(m, o, plan, 0.3, impl="torch"), inputs)
    assert torch.autograd.gradcheck(lambda m, o: ops.patch_restore(m, plan, impl="torch"), inputs)


def test_registration_passes_opcheck(device):
    mixed, original, plan = make((2, 3, 4, 2), torch.float32, device)
    mixed, original = mixed.clone().requires_grad_(), original.requires_grad_()
    torch.library.opcheck(mixing._sample_plan.op, (torch.tensor(3, device=device), 5, 2, 3, 2))
    torch.library.opcheck(mixing._patch_gather.op, (mixed, plan.source, plan.inverse))
    torch.library.opcheck(mixing._patch_blend.op, (mixed, original, plan.source, 0.3))
    torch.library.opcheck(mixing._patch_blend_backward.op, (mixed, plan.source, 0.3))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_keeps_the_inputs_dtype(impl, device):
    x, other, plan = make((2, 3, 4, 2), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.patch_mix(x, plan, impl=impl).dtype == torch.float32
        assert ops.patch_blend(x, other, plan, 0.5, impl=impl).dtype == torch.float32


def test_errors_name_what_is_wrong(device):
    x, other, plan = make((2, 3, 4, 2), torch.float32, device)
    with pytest.raises(ValueError, match=r"patch_mix: x must be \[B, N, C\] with \[B, N\] = \[2, 3\], got \[2, 2, 4\]"):
        ops.patch_mix(x[:, :2], plan)
    with pytest.raises(ValueError, match=r"patch_blend: .*float32.*float16"):
        ops.patch_blend(x, other.half(), plan, 0.5)
    with pytest.raises(RuntimeError, match=r"patch_restore: impl='triton' cannot run on float64 \[2, 3, 4\].*dtype"):
        ops.patch_restore(x.double(), plan, impl="triton")


@pytest.mark.parametrize(
    ("batch", "patches", "group_size"),
    [(8, 196, 4), (5, 7, 1), (14, 3, 7), (66, 5, 33)],  # the model's; the identity; a prime; many Philox calls
)
def test_both_implementations_draw_the_same_plan(batch, patches, group_size, device, poisoned_memory):
    for seed, first_group in ((3, 0), (-(2**40) - 1, 2**33 + 5)):
        expected = MixPlan.sample(
            batch, patches, group_size, seed=seed, first_group=first_group, device=device, impl="torch"
        )
        tensor = torch.tensor(seed, device=device)
        plan = MixPlan.sample(batch, patches, group_size, seed=tensor, first_group=first_group, impl="triton")
        for got, truth in ((plan.source, expected.source), (plan.inverse, expected.inverse)):
            assert got.dtype == truth.dtype == torch.int32
            assert torch.equal(got, truth)
        checked = MixPlan.from_source(plan.source, group_size)  # a bijection
        assert torch.equal(checked.inverse, plan.inverse)


def test_a_plan_depends_on_the_global_group_alone(device):
    whole = MixPlan.sample(12, 5, 3, seed=9, device=device)
    part = MixPlan.sample(6, 5, 3, seed=9, first_group=2, device=device)
    assert torch.equal(part.source + 6, whole.source[6:])
    assert not torch.equal(whole.source, MixPlan.sample(12, 5, 3, seed=10, device=device).source)
    assert (whole.labels == whole.source % 3).all()


def test_every_permutation_is_as_likely_as_another(device):
    plan = MixPlan.sample(3, 60_000, 3, seed=1, device=device)
    code = (plan.source * torch.tensor([[9], [3], [1]], device=device)).sum(dim=0)
    counts = code.bincount()
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 25  # chi-square with 5 degrees of freedom: p < 1e-4


def test_plans_are_refused_with_a_reason(device):
    with pytest.raises(ValueError, match="a batch of 6 images does not split into mixing groups of 4"):
        MixPlan.sample(6, 5, 4, device=device)
    source = MixPlan.sample(4, 5, 2, seed=0, device=device).source
    with pytest.raises(ValueError, match="no bijection"):
        MixPlan.from_source(source.clone().fill_(1), 2)
    with pytest.raises(ValueError, match="no bijection"):
        MixPlan.from_source(source.roll(2, dims=0), 2)  # permutations, but of another group's images
    with pytest.raises(ValueError, match=r"source must be \[B, N\], got \[20\]"):
        MixPlan.from_source(source.flatten(), 2)


def test_the_same_bits_at_every_run(device):
    mixed, original, plan = make((4, 6, 32, 2), torch.bfloat16, device)
    first, second = (ops.patch_blend(mixed, original, plan, 0.3, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_indices_past_31_bits(device, gpu_memory):
    gpu_memory(40)
    batch, patches, channels = 28_000, 196, 400  # 2.2e9 elements
    x = torch.randn(batch, patches, channels, device=device, dtype=torch.bfloat16).requires_grad_()
    plan = MixPlan.sample(batch, patches, 4, seed=0, device=device)
    mixed = ops.patch_mix(x, plan, impl="triton")
    blended = ops.patch_blend(mixed.detach(), x, plan, 0.5, impl="triton")
    last = slice(batch - 4, None)  # the last mixing group, at the highest addresses
    source = plan.source[last] - (batch - 4)
    assert torch.equal(mixed[last], patch_mix_reference(x[last], source))
    torch.testing.assert_close(blended[last], mixed[last])  # both halves are the mixed patches
    (grad,) = torch.autograd.grad(mixed, x, x.detach())
    inverse = plan.inverse[last] - (batch - 4)
    assert torch.equal(grad[last], patch_mix_reference(x[last], inverse))


@pytest.mark.gpu
def test_sampling_a_plan_needs_no_synchronisation(device):
    MixPlan.sample(8, 196, 4, seed=0, device=device)  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = MixPlan.sample(8, 196, 4, seed=1, device=device)
        ops.patch_mix(torch.empty(8, 196, 16, device=device), plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
