"""Grouping attention: both implementations against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.test_grouping_attention import eager as eager_attention
from mixreorg_fast import ops
from mixreorg_fast.kernels.settings import Grouping
from mixreorg_fast.ops.grouping_attention import grouping_attention_reference, grouping_noise

from .tolerances import TOLERANCE, assert_close_to_truth, relative_error

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # batch, groups, patches, channels
    (2, 8, 64, 384),  # the model's second grouping
    (1, 64, 196, 96),  # the model's first: one tile in 16 bits, several in fp32; not a multiple of a block of patches
    (3, 7, 13, 100),  # primes; channels that no block divides
    (1, 64, 300, 32),  # one image of several tiles in every dtype
    (1, 5, 1, 8),  # one patch, fewer channels than a block
    (2, 1, 37, 16),  # one group: nothing to choose
    (1, 128, 20, 16),  # as many groups as a kernel takes
]
TRAINING = {"hard": True, "seed": 2**40 + 3, "first_image": 2**33 - 1, "tau": 0.7}
EVALUATION = {"hard": True, "return_assignment": "soft"}
SOFT = {"hard": False, "seed": 5, "eps": 0.5}
NOISE_TOLERANCE = 4.5e-6  # of the hardware's logarithm, by its specification
MARGIN = 1e-4  # between the best two logits: no rounding below it changes a hard assignment


def make(shape, dtype, device, settings=TRAINING):
    """q, and k and v as views into one projection, as in the model; such that no hard assignment is close."""
    batch, groups, patches, channels = shape
    keys = ("seed", "first_image", "tau")
    for attempt in range(100):
        generator = torch.Generator(device).manual_seed(attempt)
        q = 2 * torch.randn(batch, groups, channels, device=device, generator=generator)
        kv = torch.randn(batch, patches, 2 * channels, device=device, generator=generator)
        q, (k, v) = q.to(dtype), kv.to(dtype).chunk(2, dim=2)
        _, _, noisy = reference(q, k, v, hard=False, **{key: settings[key] for key in keys if key in settings})
        best = noisy.log().topk(min(2, groups), dim=1).values
        if groups == 1 or (best[:, 0] - best[:, 1]).min() > MARGIN:
            return tuple(x.requires_grad_() for x in (q, k, v))
    raise AssertionError("no inputs with a clear assignment")


def reference(q, k, v, scale=None, seed=None, upcast=torch.float64, operands=None, **settings):
    settings = Grouping(q.shape[2] ** -0.5 if scale is None else scale, **settings)
    return grouping_attention_reference(q, k, v, seed, settings, upcast=upcast, operands=operands)


def truth(q, k, v, *, return_assignment="none", **settings):
    """The op by its definition in fp64."""
    out, soft, used = reference(q, k, v, **settings)
    return {"none": out, "soft": (out, soft), "used": (out, used)}[return_assignment]


def pytorch(q, k, v, *, return_assignment="none", **settings):
    """What PyTorch reaches in the inputs' dtype: in 16 bits, exact but for what every matrix product has to round."""
    upcast, operands = (torch.float32, None) if q.dtype == torch.float32 else (torch.float64, q.dtype)
    out, soft, used = reference(q, k, v, upcast=upcast, operands=operands, **settings)
    out, soft, used = out.to(v.dtype), soft.float(), used.float()
    return {"none": out, "soft": (out, soft), "used": (out, used)}[return_assignment]


def outputs_and_gradients(function, inputs: tuple[Tensor, ...], dtype=None) -> list[Tensor]:
    """Of `function` in `dtype`, for fixed random gradients of its outputs."""
    inputs = [x.detach().to(dtype).requires_grad_() if dtype else x for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    # cotangents that every dtype holds exactly
    grads = [torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def assert_as_exact_as_pytorch(inputs, dtype, settings):
    results = outputs_and_gradients(lambda *x: ops.grouping_attention(*x, impl="triton", **settings), inputs)
    baselines = outputs_and_gradients(lambda *x: pytorch(*x, **settings), inputs)
    truths = outputs_and_gradients(lambda *x: truth(*x, **settings), inputs, torch.float64)
    # Gradients of q and k pass through a softmax Jacobian. In fp32 it takes differences of products; in 16 bits an
    # element that lies between two numbers may be rounded to either.
    factors = (4, 4, 2) if dtype == torch.float32 else (2, 2, 1)
    tolerances = [TOLERANCE[dtype] * factor for factor in (*[1] * (len(truths) - 3), *factors)]
    if settings.get("seed") is not None:
        tolerances = [tolerance + NOISE_TOLERANCE for tolerance in tolerances]
    for result, baseline, true, tolerance in zip(results, baselines, truths, tolerances, strict=True):
        assert result.dtype == baseline.dtype
        assert_close_to_truth(result, baseline, true, dtype, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_as_exact_as_pytorch(shape, dtype, device, poisoned_memory):
    assert_as_exact_as_pytorch(make(shape, dtype, device), dtype, TRAINING)


@pytest.mark.parametrize("return_assignment", ["none", "soft", "used"])
@pytest.mark.parametrize("settings", [TRAINING, EVALUATION, SOFT, {**SOFT, "seed": None}])
@pytest.mark.parametrize("shape", [(1, 8, 11, 32), (1, 64, 70, 16)])  # one tile; several in fp32
def test_every_mode_is_as_exact_as_pytorch(shape, settings, return_assignment, device, poisoned_memory):
    settings = {**settings, "return_assignment": return_assignment}
    assert_as_exact_as_pytorch(make(shape, torch.float32, device, settings), torch.float32, settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [EVALUATION, SOFT, {**TRAINING, "return_assignment": "used"}])
def test_modes_in_16_bits(settings, device, poisoned_memory):
    for shape in ((1, 64, 196, 32), (1, 64, 270, 16)):  # the first grouping, and one of several tiles
        assert_as_exact_as_pytorch(make(shape, torch.bfloat16, device, settings), torch.bfloat16, settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_interpreter_rounds_as_a_gpu_does(dtype, device):
    """Else the errors of the other tests would not be those of the kernel that ships."""
    inputs = make((1, 64, 196, 384), dtype, device)
    results = outputs_and_gradients(lambda *x: ops.grouping_attention(*x, impl="triton", **TRAINING), inputs)
    rounding, exact = (
        outputs_and_gradients(lambda *x, of=of: of(*x, **TRAINING), inputs, kind)
        for of, kind in ((pytorch, None), (truth, torch.float64))
    )
    for result, same, true in zip(results, rounding, exact, strict=True):
        assert_close_to_truth(result, same, true, dtype)
        assert (result == same).double().mean() > 0.98  # the rest: roundings of sums in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_err_less_than_eager_pytorchs(dtype, device, monkeypatch):
    """Rounding the gradient of the logits once costs less than what GroupViT's own lines round in 16 bits."""
    settings = {"seed": 3}
    inputs = make((1, 8, 64, 384), dtype, device, settings)
    noise = grouping_noise(1, 8, 64, 3, device=device)
    monkeypatch.setattr(Tensor, "exponential_", lambda _: torch.exp(-noise))  # eager takes its negative logarithm
    results = outputs_and_gradients(lambda *x: ops.grouping_attention(*x, impl="triton", **settings), inputs)
    eager = outputs_and_gradients(lambda *x: eager_attention(*x, None, "none"), inputs)
    truths = outputs_and_gradients(lambda *x: truth(*x, **settings), inputs, torch.float64)
    for result, other, true in zip(results, eager, truths, strict=True):
        assert relative_error(result, true).square().mean() < relative_error(other, true).square().mean()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_are_read_in_place_or_copied(impl, device):
    q, k, v = (x.detach() for x in make((4, 8, 11, 16), torch.float32, device))
    views = {
        "group tokens shared by the images": (q[:1].expand(4, -1, -1), k, v),
        "patches first": (q.transpose(0, 1).contiguous().transpose(0, 1), k.transpose(0, 1).clone().transpose(0, 1), v),
        "channels apart": tuple(x.mT.contiguous().mT for x in (q, k, v)),
    }
    for inputs in views.values():
        inputs = [x.requires_grad_() for x in inputs]
        out = ops.grouping_attention(*inputs, seed=1, impl=impl)
        dense = [x.detach().contiguous().requires_grad_() for x in inputs]
        expected = ops.grouping_attention(*dense, seed=1, impl=impl)
        assert torch.equal(out, expected)
        # the gradient of a sum is one expanded number
        for got, want in zip(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), dense), strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_noise_depends_on_the_global_image_alone(impl, device):
    q, k, v = make((4, 8, 11, 16), torch.float32, device)
    first = 2**32 - 2  # images on both sides of the counter's low word
    whole = ops.grouping_attention(q, k, v, seed=7, first_image=first, impl=impl)
    part = ops.grouping_attention(q[2:], k[2:], v[2:], seed=7, first_image=first + 2, impl=impl)
    assert torch.equal(whole[2:], part)
    tensor = torch.tensor(7, device=device)
    assert torch.equal(whole, ops.grouping_attention(q, k, v, seed=tensor, first_image=first, impl=impl))
    assert not torch.equal(whole, ops.grouping_attention(q, k, v, seed=8, first_image=first, impl=impl))


def test_both_implementations_draw_the_same_noise(device):
    """With q = 0 the soft assignment is the softmax of the noise itself: its logarithms differ as the noise does."""
    q, k, v = (torch.zeros(2, n, 16, device=device) for n in (64, 70, 70))
    for seed, first_image in ((0, 0), (-(2**62) - 5, 2**40), (2**64 - 1, 2**32 - 1)):
        _, used = ops.grouping_attention(
            q, k, v, hard=False, seed=seed, first_image=first_image, return_assignment="used", impl="triton"
        )
        noise = grouping_noise(2, 64, 70, seed, first_image, device=device).double()
        torch.testing.assert_close(used.double().log(), noise.log_softmax(dim=1), rtol=1e-6, atol=2 * NOISE_TOLERANCE)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ties_take_the_lowest_group(impl, device):
    q, k, v = make((2, 8, 11, 16), torch.float32, device)
    q = q.detach()[:, [5, 5, 0, 3, 3, 3, 1, 5]]  # groups 0, 1 and 7 are equal, and 3, 4 and 5
    _, used = ops.grouping_attention(q, k, v, return_assignment="used", impl=impl)
    assert torch.equal(used.sum(dim=1), torch.ones(2, 11, device=device))
    assert used[:, [1, 4, 5, 7]].sum() == 0
    assert used[:, [0, 3]].sum() > 0


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter computes with numpy
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_is_not_hidden(impl, device):
    inputs = make((2, 8, 11, 16), torch.float32, device)
    for index in range(3):
        damaged = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.no_grad():
            damaged[index][1, 4, 3] = float("nan")
        out = ops.grouping_attention(*damaged, seed=1, impl=impl)
        assert out[0].isfinite().all()
        assert out[1].isnan().any(dim=1)[3 if index == 2 else slice(None)].all()
        grads = torch.autograd.grad(out.sum(), damaged)
        assert all(grad[0].isfinite().all() for grad in grads)
        assert any(grad[1].isnan().any() for grad in grads)


def test_whole_rows_are_prefetched_where_the_device_can(monkeypatch):
    from mixreorg_fast.kernels import grouping_problem as kernels

    monkeypatch.setattr(kernels, "INTERPRET", True)
    assert kernels.prefetch_bytes(torch.empty(2, 3, 16, device="meta")) == 0
    monkeypatch.setattr(kernels, "INTERPRET", False)
    for capability, dtype, width, size in (
        (90, torch.bfloat16, 384, 768),
        (120, torch.float32, 8, 32),
        (89, torch.bfloat16, 384, 0),  # has no such instruction
        (90, torch.bfloat16, 100, 0),  # rows of 200 bytes: not a multiple of 16
    ):
        monkeypatch.setattr(kernels, "architecture", lambda _, capability=capability: capability)
        rows = torch.empty(2, 3, 2 * width, dtype=dtype, device="meta")
        assert kernels.prefetch_bytes(rows[..., :width], rows[..., width:]) == size
    assert kernels.prefetch_bytes(torch.empty(2, 3, 17, device="meta")[..., 1:]) == 0  # rows not aligned


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_images_and_no_patches(impl, device):
    q, k, v = (torch.zeros(0, n, 16, device=device, requires_grad=True) for n in (8, 11, 11))
    out = ops.grouping_attention(q, k, v, impl=impl)
    assert out.shape == (0, 8, 16)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    q, k, v = (torch.ones(2, n, 16, device=device, requires_grad=True) for n in (8, 0, 0))
    out = ops.grouping_attention(q, k, v, impl=impl)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.parametrize("settings", [TRAINING, SOFT])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_winners_are_those_of_the_used_assignment(impl, settings, device, poisoned_memory):
    q, k, v = make((2, 6, 37, 16), torch.float32, device, settings)
    expected, used = ops.grouping_attention(q, k, v, return_assignment="used", impl=impl, **settings)
    out, winner = ops.grouping_attention(q, k, v, return_assignment="winner", impl=impl, **settings)
    assert torch.equal(out, expected)
    assert winner.dtype == torch.int64 and not winner.requires_grad
    assert torch.equal(winner, used.argmax(dim=1)) and winner.unique().numel() > 3
    for with_map, without in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (expected, out)), strict=True):
        torch.testing.assert_close(without, with_map)
    k = k.detach().clone()
    k[1, 4, 3] = float("nan")  # the winner must still be a valid index
    _, winner = ops.grouping_attention(q, k, v, return_assignment="winner", impl=impl, **settings)
    assert winner.min() >= 0 and winner.max() < 6


@pytest.mark.parametrize("shape", [(2, 8, 30, 32), (1, 64, 70, 32)])  # one tile; several
def test_the_same_bits_at_every_run(shape, device):
    inputs = make(shape, torch.float32, device)

    def function(q, k, v):
        return ops.grouping_attention(q, k, v, return_assignment="used", impl="triton", **TRAINING)

    for first, second in zip(*(outputs_and_gradients(function, inputs) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_an_unused_output_needs_no_gradient(device):
    inputs = make((1, 8, 11, 16), torch.float32, device)
    for used_output in (0, 1):
        results = []
        for impl in IMPLEMENTATIONS:
            outputs = ops.grouping_attention(*inputs, return_assignment="used", impl=impl, **TRAINING)
            loss = outputs[used_output].square().sum()
            results.append(torch.autograd.grad(loss, inputs, allow_unused=True))
        for want, got in zip(*results, strict=True):
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 3])
def test_gradcheck_of_the_reference(seed, device):
    q, k, v = (x.detach().double().requires_grad_() for x in make((2, 3, 5, 4), torch.float32, device))

    def function(q, k, v):
        return reference(q, k, v, hard=False, seed=seed, tau=0.8, eps=0.3)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_the_hard_gradient_is_the_soft_ones(device):
    """Straight through: around its own values, the hard assignment has the soft one's derivative."""
    q, k, v = make((2, 3, 5, 4), torch.float32, device)
    cotangent = torch.randn(2, 3, 5, device=device, dtype=torch.float64)
    hard, soft = (
        torch.autograd.grad(reference(q, k, v, hard=hard, seed=3)[2], (q, k), cotangent) for hard in (True, False)
    )
    for got, want in zip(hard, soft, strict=True):
        assert torch.equal(got, want)


def test_registration_passes_opcheck(device):
    q, k, v = make((1, 3, 5, 16), torch.float32, device)
    seed = torch.tensor(3, device=device)
    forward, backward = (getattr(torch.ops.mixreorg, f"grouping_attention{x}").default for x in ("", "_backward"))
    settings = Grouping(0.25, first_image=2, return_assignment="used")
    torch.library.opcheck(forward, (q, k, v, seed, *settings))
    torch.library.opcheck(forward, (q, k, v, None, *Grouping(0.25, hard=False)))
    out, assignment, winner, total = forward(q, k, v, seed, *settings)
    saved = (x.detach() for x in (out, assignment, q, k, v, seed, out, winner, total))
    torch.library.opcheck(backward, (*saved, *settings))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_takes_the_inputs_in_its_dtype_and_nothing_else(impl, device):
    q, k, v = make((2, 8, 11, 16), torch.bfloat16, device)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    with torch.autocast(device.type, torch.bfloat16):
        out, assignment = ops.grouping_attention(*wide, return_assignment="used", impl=impl, **TRAINING)
    expected, used = ops.grouping_attention(q, k, v, return_assignment="used", impl=impl, **TRAINING)
    assert out.dtype == torch.bfloat16
    assert assignment.dtype == torch.float32
    assert torch.equal(out, expected)  # logits and sums were not rounded to bf16
    assert torch.equal(assignment, used)
    for got, want in zip(
        torch.autograd.grad(out.sum(), wide), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


def test_errors_name_what_is_wrong(device):
    q, k, v = make((1, 3, 5, 16), torch.float32, device)
    with pytest.raises(
        ValueError, match=r"expected q \[B, G, C\] and k, v \[B, N, C\], got \[1, 3, 16\], \[1, 4, 16\]"
    ):
        ops.grouping_attention(q, k[:, :4], v)
    with pytest.raises(ValueError, match="return_assignment must be none, soft, used or winner, got 'hard'"):
        ops.grouping_attention(q, k, v, return_assignment="hard")
    with pytest.raises(RuntimeError, match=r"cannot run on float32 \[1, 3, 16\].*several dtypes.*bfloat16"):
        ops.grouping_attention(q, k, v.bfloat16(), impl="triton")
    with pytest.raises(RuntimeError, match="129 groups, at most 128"):
        ops.grouping_attention(q.expand(-1, 3, -1).repeat(1, 43, 1), k, v, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64, 196, 384), (64, 8, 64, 384), (16, 64, 784, 384)])
@pytest.mark.parametrize("settings", [TRAINING, {**TRAINING, "return_assignment": "used"}, EVALUATION])
def test_the_models_shapes(shape, dtype, settings, device):
    """Tens of thousands of patches always hold close ones: give those to one group by a wide margin."""
    batch, groups, patches, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    q = 2 * torch.randn(batch, groups, channels, device=device, generator=generator)
    kv = torch.randn(batch, patches, 2 * channels, device=device, generator=generator)
    q, (k, v) = q.to(dtype), kv.to(dtype).chunk(2, dim=2)
    keys = ("seed", "first_image", "tau")
    with torch.no_grad():
        _, _, noisy = reference(q, k, v, hard=False, **{key: settings[key] for key in keys if key in settings})
        best = noisy.log().topk(2, dim=1)
        close = best.values[:, 0] - best.values[:, 1] < MARGIN
        image, patch = close.nonzero(as_tuple=True)
        k[image, patch] = (8 * q[image, best.indices[image, 0, patch]].float()).to(dtype)
    assert_as_exact_as_pytorch(tuple(x.requires_grad_() for x in (q, k, v)), dtype, settings)


@pytest.mark.gpu
def test_indices_past_31_bits(device, gpu_memory):
    gpu_memory(60)
    batch, groups, patches, channels = 12_000, 64, 196, 1024  # 2.4e9 elements in k
    q = torch.randn(batch, groups, channels, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, patches, channels, device=device, dtype=torch.bfloat16) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    last = [x.detach()[-2:].clone().requires_grad_() for x in inputs]
    out = ops.grouping_attention(*inputs, seed=1, impl="triton")
    expected = ops.grouping_attention(*last, seed=1, first_image=batch - 2, impl="triton")
    assert torch.equal(out[-2:], expected)
    for got, want in zip(
        torch.autograd.grad(out, inputs, out.detach()),
        torch.autograd.grad(expected, last, expected.detach()),
        strict=True,
    ):
        assert torch.equal(got[-2:], want)
