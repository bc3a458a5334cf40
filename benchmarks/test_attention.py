"""Attention: image tokens as one dense batch, captions packed; the order of `MEASURED` is read from these rows."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mixreorg_fast import ops
from mixreorg_fast.ops.attention import Packing, xformers_problems

from .harness import CPU_BF16, DEVICE, DTYPE, ON_GPU, Case, Work, matrix

# images, tokens, heads: the first stage, of patches and group tokens, at 224 px and at 448 px.
DENSE = [(1024, 260, 6), (256, 848, 6)] if ON_GPU else [(8, 260, 6)]
# captions, shortest and longest, heads.
PACKED = [(1024, 10, 22, 4), (4096, 3, 12, 4)] if ON_GPU else [(64, 10, 22, 4)]
CONTEXT, CHANNELS = 77, 64


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def eager_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Padded to the context and back."""
    captions = len(packing.last)
    place = packing.sequence * CONTEXT + packing.position
    padded = (x.new_zeros(captions * CONTEXT, *x.shape[2:]).index_copy(0, place, x[0]) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (captions, CONTEXT)).transpose(1, 2) for x in padded)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return out.flatten(0, 1)[place][None]


def views(batch: int, tokens: int, heads: int, generator: torch.Generator, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """Queries, keys and values as the model has them: views of one projection."""
    qkv = torch.randn(batch, tokens, 3, heads, CHANNELS, device=DEVICE, generator=generator).to(dtype)
    return [x.requires_grad_() for x in qkv.unbind(2)]


def work(rows: int, pairs: int, heads: int, dtype: torch.dtype) -> dict[str, Work]:
    """Of `rows` tokens and `pairs` of a query and a key: two products forward, five backward (the logits again)."""
    tensor, product = rows * heads * CHANNELS * dtype.itemsize, 2 * pairs * heads * CHANNELS
    forward, backward = Work(4 * tensor, 2 * product), Work(8 * tensor, 5 * product)
    return {"fwd": forward, "bwd": backward, "fwd+bwd": Work(12 * tensor, 7 * product)}


def names(*on_gpu: str) -> list[str]:
    """Implementations: on a GPU these besides PyTorch's."""
    if not ON_GPU:
        return ["torch", "products"]
    return ["torch", *(name for name in on_gpu if name != "xformers" or not xformers_problems())]


def dense_case(images: int, tokens: int, heads: int, dtype: torch.dtype = DTYPE) -> Case:
    return Case(
        op="attention",
        shape=f"{images}x{tokens}x{heads}x{CHANNELS}",
        batch=images,
        dtype=dtype,
        inputs=lambda generator: views(images, tokens, heads, generator, dtype),
        implementations={
            "eager": eager,
            **{name: functools.partial(ops.attention, impl=name) for name in names("xformers")},
        },
        work=work(images * tokens, images * tokens**2, heads, dtype),
    )


def packed_case(captions: int, shortest: int, longest: int, heads: int, dtype: torch.dtype = DTYPE) -> Case:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (captions,), generator=generator).tolist()

    def inputs(generator: torch.Generator) -> tuple:
        packing = Packing.of(lengths, DEVICE)
        return *views(1, packing.rows, heads, generator, dtype), packing

    def run(q: Tensor, k: Tensor, v: Tensor, packing: Packing, name: str) -> Tensor:
        return ops.attention(q, k, v, causal=True, lengths=packing, impl=name)

    return Case(
        op="attention, packed",
        shape=f"{captions} of {shortest}-{longest}x{heads}x{CHANNELS}",
        batch=captions,
        dtype=dtype,
        inputs=inputs,
        implementations={
            "eager": eager_packed,
            **{name: functools.partial(run, name=name) for name in names("varlen", "xformers")},
        },
        work=work(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), heads, dtype),
    )


DTYPES = [DTYPE, *([torch.bfloat16] if CPU_BF16 else [])]


@matrix(
    [
        case(*shape, dtype=dtype)
        for case, shapes in ((dense_case, DENSE), (packed_case, PACKED))
        for shape in shapes
        for dtype in DTYPES
    ]
)
def test_attention(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
