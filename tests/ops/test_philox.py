"""Counter-based random numbers: the published known answers, and the noise made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from mixreorg_fast import ops
from mixreorg_fast.ops.philox import gumbel, philox, seed_tensor

# Random123's known answers for Philox4x32-10: counter, key (low, high), result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_known_answers(counter, key, answer, as_tensor, device):
    low, high = words(key)
    seed = low | high << 32
    if as_tensor:
        seed = seed_tensor(seed, device)
    numbers = philox(seed, *(torch.tensor(word, device=device) for word in words(counter)))
    assert [int(number) for number in numbers] == words(answer)


def test_seed_tensor_keeps_the_64_bits(device):
    for seed in (0, -1, 2**63 + 5, 2**64 - 1, -(2**63)):
        tensor = seed_tensor(seed, device)
        assert tensor.dtype == torch.int64
        assert tensor.shape == ()
        assert (int(tensor) - seed) % 2**64 == 0
    assert torch.equal(seed_tensor(torch.tensor([7], dtype=torch.int32), device), torch.tensor(7, device=device))


def test_gumbel_noise_is_finite_and_gumbel(device):
    extremes = gumbel(torch.tensor([0, 2**32 - 1], device=device))
    assert extremes.isfinite().all()
    counter = torch.arange(50_000, device=device)
    zero = torch.zeros_like(counter)
    noise = gumbel(torch.cat(philox(11, counter, zero, zero, zero))).double()
    assert abs(noise.mean() - 0.5772) < 0.015  # 5 standard errors
    assert abs(noise.var() - math.pi**2 / 6) < 0.05


def inlined(graph: GraphModule) -> int:
    """Operations of the largest expression that Inductor would write for a node that reads no memory.

    It copies such a node into each of its uses, so the sizes of the inputs add up.
    """
    sizes: dict[torch.fx.Node, int] = {}  # of the nodes that read nothing
    for node in graph.graph.nodes:
        created = node.op == "call_function" and getattr(node.target, "namespace", "aten") in ("aten", "prims")
        if created and all(source in sizes for source in node.all_input_nodes):
            sizes[node] = 1 + sum(sizes[source] for source in node.all_input_nodes)
    return max(sizes.values(), default=0)


@pytest.mark.slow
def test_compiled_ops_take_integer_seeds():
    """Code of bounded size, a graph for the first seed and one for all others, and the noise of eager mode."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(graph: GraphModule, _):
        graphs.append(inlined(graph))
        return graph.forward

    def draw(q: torch.Tensor, k: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
        plan = ops.MixPlan.sample(4, 9, 2, seed=seed, impl="torch")
        return plan.source, plan.inverse, ops.grouping_attention(q, k, k, seed=seed, impl="torch")

    q, k = torch.randn(4, 3, 8), torch.randn(4, 9, 8)
    compiled = torch.compile(draw, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    for seed in (7, 8, -9, 2**62):
        for result, expected in zip(compiled(q, k, seed), draw(q, k, seed), strict=True):
            torch.testing.assert_close(result, expected)
    assert len(graphs) == 2
    assert max(graphs) < 100
