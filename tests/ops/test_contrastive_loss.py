"""Contrastive loss: both implementations against the dense definition, in one process and in two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mixreorg_fast import ops
from mixreorg_fast.kernels.settings import LogitBlock
from mixreorg_fast.ops import contrastive_blocks
from mixreorg_fast.ops.contrastive_blocks import TORCH, TRITON
from mixreorg_fast.ops.contrastive_loss import contrastive_loss_reference

from .tolerances import TOLERANCE, assert_close_to_truth

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # batch, prompts (0: text is [B, D]), width
    (64, 0, 256),  # the model's width, one whole tile
    (131, 0, 100),  # a prime over one tile; a width that is not a multiple of a block
    (37, 3, 16),  # several prompts per image; the narrowest product
    (1, 3, 40),  # one image
    (129, 1, 8),  # one more than a tile; narrower than a block; [B, 1, D] is [B, D]
]


def make(shape, dtype, device, scale=14.0, seed=0):
    """Matching features: each text lies near its image."""
    batch, prompts, width = shape
    generator = torch.Generator(device).manual_seed(seed)
    image = torch.randn(batch, width, device=device, generator=generator)
    text = torch.randn(batch, max(prompts, 1), width, device=device, generator=generator) + 0.5 * image[:, None]
    if prompts == 0:
        text = text[:, 0]
    return F.normalize(image, dim=-1).to(dtype), F.normalize(text, dim=-1).to(dtype), torch.tensor([scale]).to(device)


def run(function, inputs, dtype=None, upstream=3.0):
    """The loss, and the gradients of `upstream` times it."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(upstream * loss, inputs)]


def check(inputs, impl, dtype):
    results = run(lambda *x: ops.contrastive_loss(*x, impl=impl), inputs)
    baselines = run(contrastive_loss_reference, inputs[:2] + tuple(x.to(dtype) for x in inputs[2:]))
    truths = run(contrastive_loss_reference, inputs, torch.float64)
    assert results[0].dtype == torch.float32 and [r.dtype for r in results[1:3]] == [dtype, dtype]
    # A softmax errs by the rounding of its exponent, whose size is the logits'.
    largest = (inputs[2].abs() * inputs[0].double().norm(dim=-1).max() * inputs[1].double().norm(dim=-1).max()).item()
    tolerance = TOLERANCE[dtype] + 4 * torch.finfo(torch.float32).eps * largest
    # The loss is the difference of numbers of that size, so it errs by their rounding, even where it is small.
    of_loss = TOLERANCE[dtype] + torch.finfo(torch.float32).eps / 2 * largest / (2 * truths[0].abs().item())
    tolerances = (max(tolerance, of_loss), *[tolerance] * (len(truths) - 1))
    for result, baseline, truth, most in zip(results, baselines, truths, tolerances, strict=True):
        assert_close_to_truth(result, baseline.view_as(truth), truth, dtype, most)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_as_exact_as_pytorch(shape, dtype, impl, device, poisoned_memory):
    check(make(shape, dtype, device), impl, dtype)


@pytest.fixture
def small_budgets(monkeypatch):
    """Strips of 128 rows for the kernels, chunks of 50 for PyTorch."""
    from mixreorg_fast.kernels import contrastive_loss as kernels

    monkeypatch.setattr(kernels, "STRIP_BYTES", 0)
    monkeypatch.setattr(kernels, "PARTIALS_BYTES", 0)
    monkeypatch.setattr(contrastive_blocks, "CHUNK_ELEMENTS", 50 * 300)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(300, 0, 32), (150, 2, 32)])
def test_strips_add_up(shape, impl, device, small_budgets, poisoned_memory):
    check(make(shape, torch.float32, device), impl, torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_matrix_of_all_logits(impl, device, small_budgets, monkeypatch):
    batch, largest = 512, 0
    from mixreorg_fast.kernels import contrastive_loss as kernels

    inputs = make((batch, 0, 16), torch.float32, device)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.nbytes)
            return out

    def watched(launcher):
        def launch(*args):
            with Sizes():  # a custom op hides what is inside from the mode outside
                return launcher(*args)

        return launch

    for name in ("log_sum_exp_forward", "gradient_backward"):
        monkeypatch.setattr(kernels, name, watched(getattr(kernels, name)))
    with Sizes():
        run(lambda *x: ops.contrastive_loss(*x, impl=impl), inputs)
    assert 0 < largest <= 4 * 128 * batch  # a strip of 128 rows


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("magnitude", "scale"),
    [
        (1.0, 100.0),  # the logit scale's limit
        (30.0, 100.0),  # logits of ±90,000: exponentials only relative to the largest
        (1.0, 0.0),  # all logits equal
    ],
)
def test_extreme_logits(magnitude, scale, impl, device):
    image, text, scale = make((70, 0, 16), torch.float32, device, scale)
    check((magnitude * image, magnitude * text, scale), impl, torch.float32)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [0.8, 0.6, 0.1, -1.0])
def test_rows_far_below_the_largest_logit_of_their_tile(cosine, dtype, swap, device):
    """Half of the images have this cosine with every text, the others 1. At a logit scale of 100 their exponentials are
    2**-29 to 2**-289 of the tile's largest: some are shared with the texts, others would be 0 if they were."""
    image, text, _ = make((70, 0, 16), torch.float32, device)
    common = torch.zeros(16, device=device)
    common[0] = 1.0
    text = F.normalize(common + 0.01 * text, dim=-1)
    image = F.normalize(common + 0.01 * image, dim=-1)
    image[::2, 0] = cosine
    image[::2, 1:] *= (1 - cosine**2) ** 0.5 / image[::2, 1:].norm(dim=-1, keepdim=True)
    image, text = (x.to(dtype) for x in ((text, image) if swap else (image, text)))
    scale = torch.tensor(100.0, device=device)
    logits = 100 * image.double() @ text.double().mT
    for lse, axis in zip(TRITON.log_sum_exp(image, text, scale, True), (1, 0), strict=True):
        truth = logits.logsumexp(axis)
        assert_close_to_truth(lse, logits.float().logsumexp(axis), truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_nearest(dtype, device):
    """Of the gradients, all but the rounding of the weights is fp32, interpreted too."""
    image, text, scale = make((40, 0, 24), dtype, device)
    row_lse, column_lse = TORCH.log_sum_exp(image, text, scale[0], True)
    logits = image.float() @ text.float().mT * scale
    weights = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp() - 2 * torch.eye(40, device=device)
    factor = 4096 if dtype == torch.float16 else 1
    weights = (weights * factor).to(dtype).float() / factor
    results = TRITON.gradient(image, text, row_lse, column_lse, scale[0], LogitBlock(1, 1, 0, True))
    # A weight halfway between two numbers of 16 bits may go either way: exponentials are not bit for bit alike. Then
    # its row and its column differ.
    for result, truth in zip(results, (weights @ text.float(), weights.mT @ image.float()), strict=True):
        assert ((result - truth).abs() < 2e-6).float().mean() > 0.8


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scales_of_any_dtype(impl, device):
    image, text, scale = make((40, 0, 24), torch.float32, device)
    expected = run(lambda *x: ops.contrastive_loss(*x, impl=impl), (image, text, scale))
    for other in (scale.double(), scale.half(), scale[0].double()):
        results = run(lambda *x: ops.contrastive_loss(*x, impl=impl), (image, text, other))
        assert [x.dtype for x in results] == 3 * [torch.float32] + [other.dtype] and results[3].shape == other.shape
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result.to(truth.dtype).view_as(truth), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_pair_has_no_loss(impl, device):
    image, text, scale = make((1, 0, 32), torch.float32, device, 100.0)
    loss, grad_image, grad_text, grad_scale = run(lambda *x: ops.contrastive_loss(*x, impl=impl), (image, text, scale))
    assert abs(float(loss)) < 2e-5 and float(grad_image.abs().max()) < 2e-3 and abs(float(grad_scale)) < 2e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_any_scale_and_frozen_inputs(impl, device):
    image, text, scale = make((40, 0, 24), torch.float32, device)
    expected = run(contrastive_loss_reference, (image, text, scale))
    apart = image.T.contiguous().T  # features lie apart
    wider = torch.stack([text, text], dim=1)[:, 0]  # rows of a wider tensor
    results = run(lambda *x: ops.contrastive_loss(*x, impl=impl), (apart, wider, scale))
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth)
    for other in (14.0, scale[0]):
        torch.testing.assert_close(ops.contrastive_loss(image, text, other, impl=impl), expected[0])
    for index in range(3):  # one input alone needs a gradient
        inputs = [x.detach().clone() for x in (image, text, scale)]
        inputs[index].requires_grad_()
        (3 * ops.contrastive_loss(*inputs, impl=impl)).backward()
        torch.testing.assert_close(inputs[index].grad, expected[1 + index])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_same_bits_every_time(impl, device):
    inputs = make((150, 2, 32), torch.bfloat16, device)
    first, second = (run(lambda *x: ops.contrastive_loss(*x, impl=impl), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_takes_features_in_its_dtype(impl, device):
    image, text, scale = make((40, 0, 24), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = ops.contrastive_loss(image, text, scale, impl=impl)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ops.contrastive_loss(image.bfloat16(), text.bfloat16(), scale, impl=impl))
    mixed = ops.contrastive_loss(image.bfloat16(), text.bfloat16().float(), scale, impl=impl)
    torch.testing.assert_close(mixed, loss, atol=1e-4, rtol=0)


def test_gradcheck(device):
    inputs = [x.double().requires_grad_() for x in make((5, 2, 4), torch.float32, device, 3.0)]
    assert torch.autograd.gradcheck(contrastive_loss_reference, inputs)
    assert torch.autograd.gradcheck(lambda *x: ops.contrastive_loss(*x, impl="torch"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration_passes_opcheck(dtype, device):
    """With a logit scale in fp64 too: outputs are fp32."""
    image, text, scale = make((5, 2, 16), torch.float32, device)
    texts, scale = text.flatten(0, 1), scale[0].to(dtype)
    for both in (False, True):
        torch.library.opcheck(torch.ops.mixreorg.contrastive_log_sum_exp.default, (image, texts, scale, both))
        row_lse, column_lse = TORCH.log_sum_exp(image, texts, scale, True)
        arguments = (image, texts, row_lse, column_lse, scale, *LogitBlock(1, 2, 0, both))
        torch.library.opcheck(torch.ops.mixreorg.contrastive_gradient.default, arguments)


def test_errors_name_what_is_wrong(device):
    image, text, scale = make((4, 0, 16), torch.float32, device)
    with pytest.raises(
        ValueError, match=r"image \[B, D\] and text \[B, D\] or \[B, P, D\], got \[4, 16\] and \[3, 16\]"
    ):
        ops.contrastive_loss(image, text[:3], scale)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run on float64 \[4, 16\].*dtype torch.float64"):
        ops.contrastive_loss(image.double(), text.double(), scale, impl="triton")
    with pytest.raises(ValueError, match="impl must be 'auto' or one of 'triton', 'torch'"):
        ops.contrastive_loss(image, text, scale, impl="fast")


RANKS = 4
DISTRIBUTED_CASES = [  # shape of a rank's share, implementation, which inputs need gradients
    (shape, impl, needed, exchange)
    for exchange in ("gather", "ring")
    for shape, impl, needed in (
        ((6, 0, 16), "torch", (True, True, True)),
        ((6, 0, 16), "triton", (True, True, True)),
        ((5, 3, 16), "torch", (True, True, True)),
        ((5, 3, 16), "triton", (True, True, True)),
        ((5, 3, 16), "torch", (False, True, False)),
        ((5, 0, 16), "torch", (True, False, False)),
    )
]


def run_rank(rank: int, folder: str) -> None:
    """One of several ranks: its share of every case's batch, results to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = []
    for shape, impl, needed, exchange in DISTRIBUTED_CASES:
        if impl == "triton" and torch.cuda.is_available():
            impl = "torch"  # the ranks are on the CPU; kernels run there under the interpreter alone
        image, text, scale = make((RANKS * shape[0], *shape[1:]), torch.float32, torch.device("cpu"))
        share = slice(rank * shape[0], (rank + 1) * shape[0])
        inputs = [
            x.clone().requires_grad_(need) for x, need in zip((image[share], text[share], scale), needed, strict=True)
        ]
        loss = ops.contrastive_loss(*inputs, impl=impl, exchange=exchange)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.launch
def test_four_ranks_equal_one_process_with_the_whole_batch(tmp_path: Path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for (shape, _, needed, _), *results in zip(DISTRIBUTED_CASES, *ranks, strict=True):
        whole = make((RANKS * shape[0], *shape[1:]), torch.float32, torch.device("cpu"))
        loss, image, text, scale = run(contrastive_loss_reference, whole, upstream=1.0)
        losses, images, texts, scales = zip(*results, strict=True)
        assert all(torch.equal(losses[0], other) for other in losses)  # the same bits on every rank
        torch.testing.assert_close(losses[0], loss, atol=1e-5, rtol=1e-5)
        # What data parallelism makes of gradients that are world_size times a rank's share: their average.
        average = [
            torch.cat(images) / RANKS if needed[0] else None,
            torch.cat(texts) / RANKS if needed[1] else None,
            sum(scales) / RANKS if needed[2] else None,
        ]
        for got, truth, need in zip(average, (image, text, scale), needed, strict=True):
            if need:
                torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_batch_natively(dtype, device):
    check(make((5000, 0, 256), dtype, device, 50.0), "triton", dtype)


@pytest.mark.gpu
def test_memory_at_a_batch_of_32768(device):
    inputs = [x.requires_grad_() for x in make((32768, 0, 256), torch.bfloat16, device)]

    def peak(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(function(*inputs), inputs)
        return torch.cuda.max_memory_allocated() - before, gradients

    kernel, _ = peak(lambda *x: ops.contrastive_loss(*x, impl="triton"))
    eager, _ = peak(contrastive_loss_reference)
    assert kernel <= 0.02 * eager


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    rows, width = 2**23 + 3, 256
    features = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    columns, scale = torch.randn(16, width, device=device, dtype=torch.bfloat16), torch.tensor(0.1, device=device)
    lse, _ = TRITON.log_sum_exp(features, columns, scale, False)
    truth, _ = TORCH.log_sum_exp(features[-1000:], columns, scale, False)
    torch.testing.assert_close(lse[-1000:], truth, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.gpu
def test_cuda_graph_and_compile(device):
    inputs = [x.requires_grad_() for x in make((1000, 0, 256), torch.bfloat16, device)]

    def step():
        loss = ops.contrastive_loss(*inputs, impl="triton")
        return loss, *torch.autograd.grad(loss, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    compiled = torch.compile(lambda *x: ops.contrastive_loss(*x, impl="triton"), fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, expected[0])
    gradients = torch.autograd.grad(compiled, inputs)
    for got, truth in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(got, truth)
