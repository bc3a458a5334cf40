"""Every op at once, taken whole: by torch.compile(fullgraph=True), by activation checkpointing, by a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixreorg_fast import ops
from mixreorg_fast.ops import MixPlan

pytestmark = pytest.mark.slow

BATCH, PATCHES, GROUPS, CHANNELS, GROUP_SIZE = 4, 9, 4, 16, 2


def make(device: torch.device) -> tuple[Tensor, ...]:
    # The same numbers on every device: others may leave a group without patches, whose normalised feature is all noise.
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, PATCHES, CHANNELS), (BATCH, GROUPS, CHANNELS), (BATCH, CHANNELS)]
    return tuple(torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes)


def every_op(x: Tensor, queries: Tensor, texts: Tensor, seed: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """A loss and labels that go through all ops; `seed` lives on the device."""
    plan = MixPlan.sample(BATCH, PATCHES, GROUP_SIZE, seed=seed, impl=impl)
    mixed = ops.patch_mix(x, plan, impl=impl)
    mixed = ops.patch_blend(mixed, x, plan, 0.5, impl=impl)
    restored = ops.patch_restore(mixed, plan, impl=impl)
    tokens = ops.mix_tokens(torch.cat([restored, queries], dim=1), plan, impl=impl)
    tokens = ops.blend_tokens(tokens, plan, 0.5, impl=impl)
    tokens = ops.restore_tokens(tokens, plan, queries[:1], impl=impl)
    restored = tokens[-BATCH:, :PATCHES]
    segments, first = ops.grouping_attention(
        queries, restored, restored, seed=seed, return_assignment="used", impl=impl
    )
    second = torch.softmax(queries @ segments.mT, dim=1)
    segments, texts = (torch.nn.functional.normalize(tensor, dim=-1) for tensor in (segments, texts))
    mixed_loss = ops.mixed_segmentation_loss(first, second, segments, texts, plan, 5.0, impl=impl)
    loss = mixed_loss + ops.contrastive_loss(segments.mean(dim=1), texts, 5.0, impl=impl)
    maps = first.detach().unflatten(2, (3, 3))
    labels = ops.decode_segments(maps, segments.detach() @ texts.detach().mT, (8, 8), impl=impl)
    return loss, labels


def run(function, inputs: tuple[Tensor, ...], impl: str) -> list[Tensor]:
    seed = torch.tensor(7, device=inputs[0].device)
    loss, labels = function(*inputs, seed, impl)
    return [loss.detach(), labels, *torch.autograd.grad(loss, inputs)]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


# Inductor for the kernels, whose graph is small; for plain PyTorch tracing is what can fail, and costs far less.
@pytest.mark.parametrize(("impl", "backend"), [("triton", "inductor"), ("torch", "aot_eager")])
def test_one_graph_holds_every_op(impl, backend, device):
    torch._dynamo.reset()
    inputs = make(device)
    compiled = torch.compile(every_op, fullgraph=True, backend=backend)
    assert_same(run(compiled, inputs, impl), run(every_op, inputs, impl))


def test_kernels_and_reference_agree_through_the_whole_chain(device, poisoned_memory):
    inputs = make(device)
    assert_same(run(every_op, inputs, "triton"), run(every_op, inputs, "torch"))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_activation_checkpointing(impl, device):
    inputs = make(device)

    def recomputed(*arguments):
        return checkpoint(every_op, *arguments, use_reentrant=False)

    for result, truth in zip(run(recomputed, inputs, impl), run(every_op, inputs, impl), strict=True):
        assert torch.equal(result, truth)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_autocast(impl, device):
    inputs = make(device)
    with torch.autocast(device.type, torch.bfloat16):
        results = run(every_op, inputs, impl)
    assert results[0].dtype == torch.float32
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in results[2:])


@pytest.mark.gpu
def test_cuda_graph_capture(device):
    inputs = make(device)
    seed = torch.tensor(7, device=device)

    def step() -> list[Tensor]:
        loss, labels = every_op(*inputs, seed, "triton")
        return [loss, labels, *torch.autograd.grad(loss, inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for new_seed in (7, 8):  # the seed is read on the device, at every replay
        seed.fill_(new_seed)
        graph.replay()
        torch.cuda.synchronize()
        for result, truth in zip(captured, step(), strict=True):
            assert torch.equal(result, truth)
