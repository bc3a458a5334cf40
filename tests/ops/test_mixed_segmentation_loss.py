"""Mixed segmentation loss: both implementations against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixreorg_fast import ops
from mixreorg_fast.ops.mixed_segmentation_loss import (
    mixed_segmentation_logits,
    mixed_segmentation_loss_reference,
    texts_of_groups,
)
from mixreorg_fast.ops.patch_mixing import MixPlan

from .tolerances import TOLERANCE, assert_close_to_truth

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOW = pytest.mark.slow
SHAPES = [  # images, G1, N, G2, D, group size
    (4, 64, 196, 8, 256, 4),  # the model's
    (6, 7, 13, 3, 20, 3),  # primes; sides far below a block
    pytest.param((14, 8, 33, 5, 100, 7), marks=SLOW),  # a patch more than a block; a width between multiples
    pytest.param((17, 5, 9, 17, 16, 17), marks=SLOW),  # a group, segments of one more than the smallest block
    (3, 16, 32, 2, 16, 1),  # groups of one image: no loss
    pytest.param((12, 6, 10, 3, 16, 12), marks=SLOW),  # texts in two passes
    (2, 128, 35, 3, 16, 2),  # as many groups as a kernel takes
    (2, 1, 1, 1, 1, 2),  # one of everything
]


def make(shape, dtype, device, scale=14.0, hard=False):
    """Assignments that sum to one over the groups, normalised embeddings, the multiplier, and a plan."""
    images, first_groups, patches, second_groups, width, group_size = shape
    generator = torch.Generator(device).manual_seed(3)

    def random(*size):
        return torch.randn(*size, device=device, generator=generator)

    first = (2 * random(images, first_groups, patches)).softmax(1)
    second = (2 * random(images, second_groups, first_groups)).softmax(1)
    if hard:
        first = torch.zeros_like(first).scatter_(1, first.argmax(1, keepdim=True), 1.0)
    segments = F.normalize(random(images, second_groups, width), dim=-1)
    texts = F.normalize(random(images, width), dim=-1)
    plan = MixPlan.sample(images, patches, group_size, generator=torch.Generator(device).manual_seed(4))
    tensors = [x.to(dtype) for x in (first, second, segments, texts)]
    return [*tensors, torch.tensor([scale], device=device)], plan


def run(function, inputs, dtype=None, upstream=3.0):
    """The loss, and the gradients of `upstream` times it."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(upstream * loss, inputs)]


def check(inputs, plan, impl):
    def reference(upcast):
        def loss(*x):
            return mixed_segmentation_loss_reference(*x[:4], plan.source, plan.group_size, x[4], upcast=upcast)

        return loss

    results = run(lambda *x: ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl=impl), inputs)
    baselines = run(reference(torch.float32), inputs)
    truths = run(reference(torch.float64), inputs, torch.float64)
    assert results[0].dtype == torch.float32
    for result, baseline, truth, x in zip(results, baselines, truths, [None, *inputs], strict=True):
        if x is not None:
            assert result.dtype == x.dtype and result.shape == x.shape
        # Outputs round to their own dtype, all between is fp32; a softmax errs by the rounding of its exponent.
        tolerance = TOLERANCE[result.dtype] + 4 * torch.finfo(torch.float32).eps * float(inputs[4])
        assert_close_to_truth(result, baseline, truth, result.dtype, tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_as_exact_as_pytorch(shape, dtype, impl, device, poisoned_memory):
    check(*make(shape, dtype, device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hard_assignments_and_the_highest_logit_scale(impl, device):
    check(*make((8, 16, 20, 4, 32, 4), torch.float32, device, scale=100.0, hard=True), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_each_input_has_its_own_dtype(impl, device):
    (first, second, segments, texts, scale), plan = make((8, 16, 20, 4, 32, 4), torch.float32, device)
    check([first, second.half(), segments.bfloat16(), texts, scale], plan, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_any_scale_and_frozen_inputs(impl, device):
    inputs, plan = make((8, 16, 20, 4, 32, 4), torch.float32, device)

    def loss(first, second, segments, texts, scale):
        return ops.mixed_segmentation_loss(first, second, segments, texts, plan, scale, impl=impl)

    expected = run(loss, inputs)
    apart = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs[:4]]
    for result, truth in zip(run(loss, [*apart, inputs[4]]), expected, strict=True):
        torch.testing.assert_close(result, truth)
    for multiplier in (14.0, inputs[4][0]):
        torch.testing.assert_close(loss(*inputs[:4], multiplier), expected[0])
    for index in range(5):  # one input alone needs a gradient
        alone = [x.detach().clone() for x in inputs]
        alone[index].requires_grad_()
        (3 * loss(*alone)).backward()
        torch.testing.assert_close(alone[index].grad, expected[1 + index])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_same_bits_every_time(impl, device):
    inputs, plan = make((8, 16, 20, 4, 32, 4), torch.bfloat16, device)
    first, second = (
        run(lambda *x: ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl=impl), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing(impl, device):
    inputs, plan = make((8, 16, 20, 4, 32, 4), torch.float32, device)
    expected = ops.mixed_segmentation_loss(*inputs[:4], plan, inputs[4], impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.mixed_segmentation_loss(*inputs[:4], plan, inputs[4], impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scales_of_any_dtype(impl, device):
    inputs, plan = make((8, 16, 20, 4, 32, 4), torch.float32, device)
    expected = run(lambda *x: ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl=impl), inputs)
    for scale in (inputs[4].double(), inputs[4].half(), inputs[4][0].double()):
        results = run(lambda *x: ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl=impl), [*inputs[:4], scale])
        assert [x.dtype for x in results] == 5 * [torch.float32] + [scale.dtype]
        assert results[5].shape == scale.shape
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result.to(truth.dtype).view_as(truth), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(8, 16, 20, 4, 32, 4), SHAPES[3], (3, 16, 32, 2, 16, 1)])
def test_accuracy_is_the_share_of_patches_whose_image_is_found(shape, impl, device):
    (*tensors, scale), plan = make(shape, torch.float32, device)
    texts = texts_of_groups(tensors[3], plan.group_size)
    logits = mixed_segmentation_logits(*tensors[:3], texts, scale, torch.float64)
    truth = (logits.argmax(-1) == plan.labels).double().mean()
    loss, accuracy = ops.mixed_segmentation_loss(
        *(x.requires_grad_() for x in tensors), plan, scale, return_accuracy=True, impl=impl
    )
    assert torch.equal(loss, ops.mixed_segmentation_loss(*tensors, plan, scale, impl=impl))
    assert accuracy.dtype == torch.float32 and not accuracy.requires_grad and accuracy.shape == ()
    torch.testing.assert_close(accuracy.double(), truth)
    # Equal logits are decided for the lowest text, as torch.argmax does.
    _, accuracy = ops.mixed_segmentation_loss(*tensors, plan, 0.0, return_accuracy=True, impl=impl)
    torch.testing.assert_close(accuracy, (plan.labels == 0).float().mean())


def test_accuracy_is_over_the_group_whatever_the_negatives(device):
    (*tensors, scale), plan = make((8, 16, 20, 4, 32, 4), torch.float32, device)
    _, accuracy = ops.mixed_segmentation_loss(*tensors, plan, scale, return_accuracy=True)
    *tensors, texts = tensors
    more = torch.cat([texts[:3] + 1, texts, texts[:2]])
    _, of_batch = ops.mixed_segmentation_loss(
        *tensors, more, plan, scale, negatives="batch", first_text=3, return_accuracy=True
    )
    assert torch.equal(of_batch, accuracy)


def test_the_kernel_keeps_nothing_but_the_inputs(device):
    inputs, plan = make((8, 16, 20, 4, 32, 4), torch.float32, device)
    inputs = [x.requires_grad_() for x in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.mixed_segmentation_loss(*inputs[:4], plan, inputs[4], impl="triton")
    known = {x.data_ptr() for x in (*inputs, plan.source)}
    assert kept and all(x.data_ptr() in known for x in kept)


def test_gradcheck_of_the_reference(device):
    inputs, plan = make((4, 3, 5, 2, 6, 2), torch.float64, device, scale=3.0)
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl="torch"), inputs)


def test_registration_passes_opcheck(device):
    (*tensors, scale), plan = make((4, 3, 5, 2, 16, 2), torch.float32, device)
    arguments = (*(x.requires_grad_() for x in tensors), plan.source, scale[0].clone().requires_grad_(), 2)
    torch.library.opcheck(torch.ops.mixreorg.mixed_segmentation.default, arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    backward = torch.ops.mixreorg.mixed_segmentation_backward.default
    torch.library.opcheck(backward, (torch.ones(4, 5, device=device), *arguments))


def test_errors_name_what_is_wrong(device):
    (first, second, segments, texts, scale), plan = make((4, 3, 5, 2, 16, 2), torch.float32, device)
    with pytest.raises(ValueError, match=r"second \[B, G2, G1\].*got \[4, 3, 5\], \[4, 3, 2\]"):
        ops.mixed_segmentation_loss(first, second.mT, segments, texts, plan, scale)
    with pytest.raises(ValueError, match=r"a plan of \[B, N\].*\[4, 5\]"):
        ops.mixed_segmentation_loss(first[..., :4], second, segments, texts, plan, scale)
    for impl in IMPLEMENTATIONS:
        odd = MixPlan(plan.source, plan.inverse, 3)
        with pytest.raises(
            ValueError, match="^mixed_segmentation_loss: 4 images do not split into mixing groups of 3$"
        ):
            ops.mixed_segmentation_loss(first, second, segments, texts, odd, scale, impl=impl)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run on .*dtype torch.float64"):
        ops.mixed_segmentation_loss(first.double(), second, segments, texts, plan, scale, impl="triton")
    many = torch.ones(4, 129, 5, device=device)
    with pytest.raises(RuntimeError, match="G1 = 129 is above 128"):
        ops.mixed_segmentation_loss(many, second.new_ones(4, 2, 129), segments, texts, plan, scale, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patches", [196, 784])
def test_model_sizes_natively(patches, dtype, device):
    check(*make((256, 64, patches, 8, 256, 4), dtype, device, scale=50.0), "triton")


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    images = 2**31 // (64 * 784) // 4 * 4 + 8
    (first, *others, scale), plan = make((8, 64, 784, 8, 16, 4), torch.bfloat16, device)
    times = images // 8
    first = first.repeat(times, 1, 1)
    others = [x.repeat(times, *[1] * (x.dim() - 1)) for x in others]
    offset = 8 * torch.arange(times, device=device).repeat_interleave(8)[:, None]
    source = (plan.source.repeat(times, 1) + offset).int()
    losses, _ = torch.ops.mixreorg.mixed_segmentation(first, *others, source, scale[0], 4)
    assert torch.equal(losses[-8:], losses[:8])


@pytest.mark.slow
@pytest.mark.gpu
def test_cuda_graph_and_compile(device):
    inputs, plan = make((64, 64, 196, 8, 256, 4), torch.bfloat16, device)
    inputs = [x.requires_grad_() for x in inputs]

    def loss(*x):
        return ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl="triton")

    def step():
        value = loss(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    compiled = torch.compile(loss, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, expected[0])
    for got, truth in zip(torch.autograd.grad(compiled, inputs), expected[1:], strict=True):
        torch.testing.assert_close(got, truth)


def test_negatives_of_the_whole_batch():
    """Every patch against every text; with one group of all images, the loss of the group."""
    (first, second, segments, texts, scale), plan = make(SHAPES[0], torch.float64, "cpu")
    maps = torch.einsum("bgn,bhg->bnh", first, second)  # [B, N, G2], what the op never holds
    logits = scale * torch.einsum("bnh,bhd,td->bnt", maps, segments, texts)
    whole = MixPlan.sample(8, 13, 4, generator=torch.Generator().manual_seed(0))
    assert plan.group_size == len(texts)  # one group here
    got = ops.mixed_segmentation_loss(first, second, segments, texts, plan, scale, negatives="batch")
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), plan.source.long().flatten()))
    torch.testing.assert_close(got, ops.mixed_segmentation_loss(first, second, segments, texts, plan, scale))
    # Two groups: more texts, so more to tell apart.
    inputs, _ = make((8, 5, 13, 3, 16, 4), torch.float64, "cpu")
    group, batch = (ops.mixed_segmentation_loss(*inputs[:4], whole, inputs[4], negatives=n) for n in ("group", "batch"))
    assert batch > group
    # Further texts before and after the images' own.
    more = torch.cat([inputs[3][5:] + 1, inputs[3], inputs[3][:2] - 1])
    got = ops.mixed_segmentation_loss(*inputs[:3], more, whole, inputs[4], negatives="batch", first_text=3)
    logits = inputs[4] * torch.einsum("bgn,bhg,bhd,td->bnt", *inputs[:3], more)
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), whole.source.long().flatten() + 3))
    with pytest.raises(ValueError, match=r"texts \[B, D\]"):
        ops.mixed_segmentation_loss(*inputs[:3], more, whole, inputs[4], negatives="batch", first_text=6)
    with pytest.raises(RuntimeError, match="negatives of the whole batch"):
        ops.mixed_segmentation_loss(*inputs[:4], whole, inputs[4], negatives="batch", impl="triton")
    with pytest.raises(ValueError, match="negatives must be group, batch or attributed, got 'Batch'"):
        ops.mixed_segmentation_loss(*inputs[:4], whole, inputs[4], negatives="Batch")


def test_attributed_negatives():
    """The cross-entropy within the group, and that over the whole batch weighted by the attribution."""
    inputs = [x.detach().requires_grad_() for x in make((8, 5, 13, 3, 16, 4), torch.float64, "cpu")[0]]
    plan = MixPlan.sample(8, 13, 4, generator=torch.Generator().manual_seed(0))
    logits = inputs[4] * torch.einsum("bgn,bhg,bhd,td->bnt", *inputs[:4])  # [B, N, T]
    own = torch.stack([logits[b].view(13, 2, 4)[:, b // 4] for b in range(8)])  # of the image's group, [B, N, K]
    within = F.cross_entropy(own.flatten(0, 1), plan.labels.long().flatten(), reduction="none").view(8, 13)
    among_all = F.cross_entropy(logits.flatten(0, 1), plan.source.long().flatten(), reduction="none").view(8, 13)
    weight = ((4 * (-within).exp().detach() - 1) / 3).clamp(min=0)
    assert (weight == 0).any() and (weight > 0).any()
    expected = (within + weight * (among_all - within)).mean()
    got = ops.mixed_segmentation_loss(*inputs[:4], plan, inputs[4], negatives="attributed")
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)
    group, batch = (ops.mixed_segmentation_loss(*inputs[:4], plan, inputs[4], negatives=n) for n in ("group", "batch"))
    assert group < got < batch
