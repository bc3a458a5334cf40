"""Whole tokens mixed, restored and blended: both implementations against the definition, slices and concatenations."""

from __future__ import annotations

import pytest
import torch

from mixreorg_fast import ops
from mixreorg_fast.kernels.settings import Appending, Blending
from mixreorg_fast.ops import token_mixing as tokens
from mixreorg_fast.ops.patch_mixing import MixPlan
from mixreorg_fast.ops.token_mixing import blend_tokens_reference, mix_tokens_reference, restore_tokens_reference

from .tolerances import assert_close_to_truth

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # batch, patches, group tokens, channels, group size
    (4, 37, 11, 96, 2),  # neither patches nor tokens a multiple of a block; a width that 64 does not divide
    (6, 7, 5, 100, 3),  # primes; patches and group tokens in one block of tokens
    (1, 5, 3, 384, 1),  # one image, the model's width
    (7, 1, 1, 8, 7),  # one patch; a group size that is a prime
    (2, 3, 0, 1, 2),  # no group tokens; one channel
]


def make(shape, branches, dtype, device):
    """Tokens of some branches (every second row of a larger tensor), group tokens for another, and a plan."""
    batch, patches, groups, channels, group_size = shape
    plan = MixPlan.sample(batch, patches, group_size, generator=torch.Generator(device).manual_seed(1))
    generator = torch.Generator(device).manual_seed(2)
    size = (branches * batch, patches + groups, 2, channels)
    x = torch.randn(size, device=device, generator=generator).to(dtype)[:, :, 0]
    learned = torch.randn((1, groups, channels), device=device, generator=generator).to(dtype)
    return x, learned, plan


def compare(op, reference, inputs, dtype):
    """Values and gradients of `op` against `reference` in fp64, relative to `reference` in `dtype`."""

    def run(function, to):
        leaves = [x.detach().to(to).requires_grad_() for x in inputs]
        out = function(*leaves)
        grad = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(3))
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype).to(to))]

    results, baselines, truths = run(op, dtype), run(reference, dtype), run(reference, torch.float64)
    assert results[0].dtype == dtype and results[0].is_contiguous()
    for result, baseline, truth in zip(results, baselines, truths, strict=True):
        assert_close_to_truth(result, baseline, truth, dtype)
    return results[0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learned", [False, True])
def test_mixing(shape, dtype, impl, learned, device, poisoned_memory):
    x, groups, plan = make(shape, 1, dtype, device)
    out = compare(
        lambda x, *groups: ops.mix_tokens(x, plan, *groups, impl=impl),
        lambda x, *groups: mix_tokens_reference(x, plan.source, plan.group_size, *groups),
        [x, groups] if learned else [x],
        dtype,
    )
    patches = plan.source.shape[1]
    assert torch.equal(out[: len(x)], x)
    assert torch.equal(out[len(x) :, :patches], ops.patch_mix(x[:, :patches], plan, impl="torch"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("learned", "keep_mixed"), [(False, True), (True, False)])
def test_restoring(shape, dtype, impl, learned, keep_mixed, device, poisoned_memory):
    x, groups, plan = make(shape, 2, dtype, device)
    out = compare(
        lambda x, *groups: ops.restore_tokens(x, plan, *groups, keep_mixed=keep_mixed, impl=impl),
        lambda x, *groups: restore_tokens_reference(
            x, plan.inverse, plan.group_size, *(groups or [None]), keep_mixed=keep_mixed
        ),
        [x, groups] if learned else [x],
        dtype,
    )
    batch, patches = plan.source.shape
    assert torch.equal(out[:-batch], x if keep_mixed else x[:batch])
    assert torch.equal(out[-batch:, :patches], ops.patch_restore(x[batch:, :patches], plan, impl="torch"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_blending(shape, dtype, impl, device, poisoned_memory):
    x, _, plan = make(shape, 2, dtype, device)
    out = compare(
        lambda x: ops.blend_tokens(x, plan, 0.3, impl=impl),
        lambda x: blend_tokens_reference(x, plan.source, 0.3),
        [x],
        dtype,
    )
    batch, patches = plan.source.shape
    assert torch.equal(out[:batch], x[:batch])
    assert torch.equal(out[:, patches:], x[:, patches:])


@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf, which is not stored
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_only_copied_may_be_infinite(impl, device):
    """Group tokens are not blended with a weight of zero, in which infinity would be NaN."""
    x, _, plan = make((2, 3, 2, 4, 2), 2, torch.float32, device)
    x[:, 3:] = torch.inf
    x.requires_grad_()
    out = ops.blend_tokens(x, plan, 0.5, impl=impl)
    assert torch.equal(out[:, 3:], x[:, 3:]) and out[:, :3].isfinite().all()
    (grad,) = torch.autograd.grad(out, x, x.detach())
    assert not grad.isnan().any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_channels_that_lie_apart_and_expanded_images(impl, device):
    x, _, plan = make((4, 3, 2, 8, 2), 1, torch.float32, device)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), x[:1].expand(4, -1, -1)):
        assert torch.equal(ops.mix_tokens(view, plan, impl=impl), mix_tokens_reference(view, plan.source, 2))
    y = x.clone().requires_grad_()
    ops.mix_tokens(y, plan, impl=impl).sum().backward()  # the gradient is one expanded number
    torch.testing.assert_close(y.grad, torch.full_like(y, 2.0))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    x, groups, plan = make((2, 3, 2, 4, 2), 1, torch.float32, device)

    def chain(impl):
        def function(x, groups):
            x = ops.blend_tokens(ops.mix_tokens(x, plan, groups, impl=impl), plan, 0.3, impl=impl)
            return ops.restore_tokens(x, plan, impl=impl)

        inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, groups)]
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.pow(3).sum() for gradient in first), inputs)

    for result, truth in zip(chain(impl), chain("torch"), strict=True):
        torch.testing.assert_close(result, truth)


def test_registration_passes_opcheck(device):
    x, groups, plan = make((2, 3, 2, 4, 2), 2, torch.float32, device)
    x, groups = x.clone().requires_grad_(), groups.expand(2, -1, -1).clone().requires_grad_()
    for inputs in (
        (x[:2], None, plan.source, *Appending(2, True, mean=True)),
        (x, groups, plan.inverse, *Appending(2, False, mean=False)),
    ):
        torch.library.opcheck(tokens._append_branch.op, inputs)
    torch.library.opcheck(tokens._append_branch_backward.op, (x, plan.source, *Appending(2, True, mean=True)))
    torch.library.opcheck(tokens._blend_tokens.op, (x, plan.source, *Blending(2, 0.3)))


def test_autocast_keeps_the_inputs_dtype(device):
    x, _, plan = make((2, 3, 2, 4, 2), 1, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        for impl in IMPLEMENTATIONS:
            mixed = ops.mix_tokens(x, plan, impl=impl)
            assert mixed.dtype == ops.blend_tokens(mixed, plan, 0.5, impl=impl).dtype == torch.float32


def test_errors_name_what_is_wrong(device):
    x, groups, plan = make((2, 3, 2, 4, 2), 1, torch.float32, device)
    with pytest.raises(
        ValueError, match=r"mix_tokens: x must be \[2, 3 \+ G, C\] for a plan \[2, 3\], got \[2, 2, 4\]"
    ):
        ops.mix_tokens(x[:, :2], plan)
    with pytest.raises(ValueError, match=r"blend_tokens: x must be \[4, 3 \+ G, C\]"):
        ops.blend_tokens(x, plan, 0.5)
    with pytest.raises(ValueError, match=r"mix_tokens: groups must be \[2, 2, 4\] or \[1, …\], got \[1, 1, 4\]"):
        ops.mix_tokens(x, plan, groups[:, :1])
    with pytest.raises(ValueError, match=r"mix_tokens: groups are torch.float16, x is torch.float32"):
        ops.mix_tokens(x, plan, groups.half())
    with pytest.raises(RuntimeError, match=r"restore_tokens: impl='triton' cannot run on float64.*dtype"):
        ops.restore_tokens(x.repeat(2, 1, 1).double(), plan, impl="triton")


def test_images_further_apart_than_31_bits(device):
    batch, patches, groups, channels = 5, 3, 2, 16
    plan = MixPlan.sample(batch, patches, batch, seed=0, device=device)
    stride = 2**29 + 64  # of an image; within 31 bits, but not the fifth image's place
    memory = torch.empty(4 * stride + 1024, dtype=torch.float16, device=device)  # hardly any of it is ever touched
    x = memory.as_strided((batch, patches + groups, channels), (stride, channels, 1))
    x.copy_(torch.randn(x.shape))
    near = x.clone().requires_grad_()
    mixed = tokens._append_branch(x, None, plan.source, Appending(batch, True, mean=True))
    expected = mix_tokens_reference(near, plan.source, batch)
    torch.testing.assert_close(mixed, expected)
    (grad,) = torch.autograd.grad(expected, near, torch.cat([torch.zeros_like(x), x]))
    settings = Appending(batch, keep=False, mean=True)
    torch.testing.assert_close(tokens._append_branch_backward(x, plan.source, settings), grad)
    pair = MixPlan.sample(2, patches, 2, seed=0, device=device)
    blended = tokens._blend_tokens(x[1:], pair.source, Blending(2, 0.3))
    torch.testing.assert_close(blended, blend_tokens_reference(x[1:], pair.source, 0.3))


@pytest.mark.gpu
def test_indices_past_31_bits(device, gpu_memory):
    gpu_memory(60)
    batch, patches, groups, channels = 16_000, 196, 4, 400  # 1.28e9 elements a branch, 3.8e9 in all three
    plan = MixPlan.sample(batch, patches, 4, seed=0, device=device)
    x = torch.randn(batch, patches + groups, channels, device=device, dtype=torch.bfloat16)
    out = ops.restore_tokens(ops.blend_tokens(ops.mix_tokens(x, plan), plan, 0.5), plan)
    last = slice(batch - 4, None)  # the last mixing group, at the highest addresses
    assert torch.equal(out[2 * batch :][last, :patches], x[last, :patches])  # blended with itself, and put back
    assert torch.equal(out[:batch][last], x[last])
