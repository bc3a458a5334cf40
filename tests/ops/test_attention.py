"""Attention: packed sequences equal each alone, in every implementation; the choice, and what it refuses."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixreorg_fast import ops
from mixreorg_fast.config import TextConfig
from mixreorg_fast.models import text_encoder
from mixreorg_fast.models.text_encoder import TextEncoder
from mixreorg_fast.ops.attention import Packing
from mixreorg_fast.ops.dispatch import CannotRun

module = importlib.import_module("mixreorg_fast.ops.attention")  # the package has a function of that name

CONTEXT = 77
LENGTHS = [5, 1, 77, 33, 32, 5, 64]  # one row, a full bucket, one more than a bucket, two alike


def make(rows: int, heads: int = 2, width: int = 8, device: torch.device | str = "cpu", dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(0)
    # Views of one projection, as the model makes them.
    qkv = torch.randn(1, rows, 3, heads, width, generator=generator, device=device).to(dtype)
    return [x.requires_grad_() for x in qkv.unbind(2)]


def alone(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths) -> Tensor:
    """Each sequence by itself, by the definition, in fp64."""
    outs = []
    for parts in zip(*(x[0].double().split(lengths) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1) for x in parts)  # [H, n, D]
        logits = a @ b.mT * a.shape[-1] ** -0.5
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
        outs.append((logits.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(outs)[None]


def check(q, k, v, causal, lengths, packed, tolerance, impl="auto"):
    """Result and gradients against the definition; a loss over real rows alone reaches real rows alone."""
    total = sum(lengths)
    out = ops.attention(q, k, v, causal=causal, lengths=packed, impl=impl)
    assert out.shape == q.shape and out.isfinite().all()
    truth = alone(*(x[:, :total] for x in (q, k, v)), causal, lengths)
    torch.testing.assert_close(out[:, :total].double(), truth, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(truth)
    grads = torch.autograd.grad((out[:, :total].double() * weights).sum(), (q, k, v))
    for grad, expected in zip(grads, torch.autograd.grad((truth * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)
        assert not grad[:, total:].any()


@pytest.mark.parametrize("impl", ["torch", "products"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [0, 100])  # more padding than the longest sequence has rows
def test_packed_sequences_do_not_see_one_another(causal, padding, impl):
    q, k, v = make(sum(LENGTHS) + padding)
    check(q, k, v, causal, LENGTHS, LENGTHS, 1e-5, impl)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_in_half_precision(causal):
    q, k, v = make(sum(LENGTHS), dtype=torch.bfloat16)
    check(q, k, v, causal, LENGTHS, LENGTHS, 3e-2)


@pytest.mark.parametrize("width", [1, 8, 1000])
def test_any_width_of_the_buckets(width, monkeypatch):
    monkeypatch.setitem(module.BUCKET_WIDTH, "cpu", width)
    packing = Packing.of(LENGTHS, bucket=True)
    q, k, v = make(packing.rows)
    for causal in (False, True):
        check(q, k, v, causal, LENGTHS, packing, 1e-5)


@pytest.mark.parametrize("impl", ["torch", "products"])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(causal, impl):
    q, k, v = (x.view(2, 10, 2, 8) for x in make(20))
    out = ops.attention(q, k, v, causal=causal, impl=impl)
    truth = torch.cat([alone(*(x[i : i + 1] for x in (q, k, v)), causal, [10]) for i in range(2)])
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    crossed = ops.attention(q[:, :3], k, v, causal=causal, impl=impl)
    torch.testing.assert_close(crossed, out[:, :3])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "xformers", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_implementations_agree_on_a_gpu(impl, causal, device):
    packing = Packing.of(LENGTHS, device, bucket=True)
    q, k, v = make(packing.rows, width=64, device=device, dtype=torch.bfloat16)
    try:
        ops.attention(q, k, v, lengths=packing, impl=impl)
    except (CannotRun, NotImplementedError) as error:
        pytest.skip(str(error))
    check(q, k, v, causal, LENGTHS, packing, 3e-2, impl)


def test_a_packing_and_its_way_back():
    lengths = [3, 1, 4]
    packing = Packing.of(lengths, bucket=True)
    assert packing.rows == 8 and packing.cu_seqlens[:4].tolist() == [0, 3, 4, 8]
    x = torch.arange(3 * 6).view(3, 6, 1)
    assert packing.pack(x).flatten().tolist() == [0, 1, 2, 6, 12, 13, 14, 15]
    assert packing.pack(x)[0, packing.last, 0].tolist() == [2, 6, 15]


def test_padding_rows_hold_what_a_real_row_holds():
    """Padding rows are gathered like all others, so each must point at an existing caption and token."""
    generator = torch.Generator().manual_seed(0)
    padded = 0
    for _ in range(60):
        # Captions of the web: short ones mostly, some cut at the context.
        lengths = (5 + torch.randn(512, generator=generator).exp() * 14).long().clamp(max=CONTEXT).tolist()
        packing = Packing.of(lengths, bucket=True)
        assert packing.max_seqlen % 8 == 0 and max(packing.sequences) <= packing.max_seqlen
        assert packing.position.min() >= 0 and packing.position.max() < max(lengths)
        assert packing.sequence.min() >= 0 and packing.sequence.max() < len(lengths)
        plain, total = Packing.of(lengths), sum(lengths)
        for name in ("sequence", "position"):
            ours, theirs = getattr(packing, name), getattr(plain, name)
            assert torch.equal(ours[:total], theirs) and not ours[total:].any()
        assert torch.equal(packing.last, plain.last) and packing.cu_seqlens[-1] == packing.rows
        assert packing.slots.unique().numel() == packing.rows  # no place is written twice
        assert packing.slots.max() < sum(count * width for count, width in packing.buckets)
        padded += packing.rows > total
    assert padded > 50


def test_text_encoder_as_on_a_gpu(monkeypatch, varlen_on_cpu):
    """Padded rows and variable-length attention, which only a GPU takes, against packed rows without padding."""
    torch.manual_seed(0)
    config = TextConfig(width=16, heads=2, layers=2, context=CONTEXT, vocab_size=60)
    encoder = TextEncoder(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = [3, 45, 5, *[CONTEXT] * 26]  # 121 rows of padding: a sequence of 80 rows, beyond the context
    ids = torch.randint(1, 59, (len(lengths), CONTEXT))
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = 59
        row[length:] = 0

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        features = encoder(ids, torch.float32, lengths)
        gradients = torch.autograd.grad(features.square().sum(), list(encoder.parameters()))
        return features, dict(zip(dict(encoder.named_parameters()), gradients, strict=True))

    features, gradients = run()
    assert not varlen_on_cpu
    monkeypatch.setattr(text_encoder, "BUCKETED", {"cpu"})
    monkeypatch.setattr(module, "flash_reasons", lambda q: [])
    padded, padded_gradients = run()
    assert len(varlen_on_cpu) == config.layers and all(rows == sum(lengths) + 121 for rows in varlen_on_cpu)
    torch.testing.assert_close(padded, features, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def varlen_on_cpu() -> list[int]:
    """CPU kernels of PyTorch's variable-length attention, with a flash kernel's demands; the rows of each call."""
    import torch.nn.attention.varlen  # registers the operators

    calls: list[int] = []

    def sequences(q, starts, longest, *tensors):
        """Of each sequence ``[H, n, D]``, and its probabilities."""
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q)
        sizes = starts.diff()
        assert sizes.min() >= 0 and sizes.max() <= longest
        for parts in zip(*(x.double().split(sizes.tolist()) for x in (q, *tensors)), strict=True):
            q, k, *others = (x.transpose(0, 1) for x in parts)
            hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
            yield q, k, ((q * scale(q)) @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1), *others

    def scale(q):
        return q.shape[-1] ** -0.5

    def together(parts, like):
        return torch.cat([part.transpose(0, 1) for part in parts]).to(like.dtype)

    def forward(q, k, v, starts, _, longest, *others):
        calls.append(len(q))
        out = together([p @ v for _, _, p, v in sequences(q, starts, longest, k, v)], q)
        return out, q.new_zeros(q.shape[1], len(q)), q.new_zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, starts, _, longest, *others):
        grads = []
        for q_, k_, p, v_, g in sequences(q, starts, longest, k, v, grad):
            dp = g @ v_.mT
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale(q)
            grads.append((ds @ k_, ds.mT @ q_, p.mT @ g))
        return tuple(together(parts, q) for parts in zip(*grads, strict=True))

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
    return calls


def test_shapes_repeat_from_step_to_step():
    """What a compiled graph or a captured one sees of captions whose lengths differ, but hardly their sum."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randint(10, 23, (1024,), generator=generator).tolist() for _ in range(20)]
    packings = [Packing.of(lengths, bucket=True) for lengths in steps]
    seen = {(p.rows, p.max_seqlen, len(p.cu_seqlens), p.sequence.shape, p.slots.shape) for p in packings}
    assert len(seen) <= 2
    for lengths, packing in zip(steps, packings, strict=True):
        assert sum(lengths) <= packing.rows <= sum(lengths) * 17 / 16
        assert sum(packing.sequences) == packing.rows == packing.cu_seqlens[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: ops.attention(q, q, q, lengths=[3, 4]), r"S >= 7 = sum of lengths, got \[1, 6, 2, 8\]"),
        (lambda q: ops.attention(q, q, q, lengths=Packing.of([3, 2])), r"S = 5 of the packing, got \[1, 6, 2, 8\]"),
        (lambda q: ops.attention(q, q, q, lengths=[3, 0]), "numbers above 0"),
        (lambda q: Packing.of([]), "one or more"),
        (lambda q: Packing.of([3, 4], rows=6), "7 rows of 2 sequences do not fit into 6"),
    ],
)
def test_lengths_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(6)[0])


def test_what_cannot_run_says_why(monkeypatch):
    q, k, v = make(6)
    monkeypatch.setattr(module, "XFORMERS_INSTALLED", True)
    for impl in ("varlen", "xformers"):
        with pytest.raises(CannotRun, match=r"float32 \[1, 6, 2, 8\] on cpu.*tensors on cpu, CUDA is needed; dtype"):
            ops.attention(q, k, v, lengths=[6], impl=impl)
    with pytest.raises(CannotRun, match="takes packed tensors only"):
        ops.attention(q, k, v, impl="varlen")
    monkeypatch.setattr(module, "XFORMERS_INSTALLED", False)
    with pytest.raises(CannotRun, match="xformers is not installed"):
        ops.attention(q, k, v, impl="xformers")


def test_auto_follows_the_measured_table(monkeypatch):
    q, k, v = make(6)
    taken = []
    fake = {name: (lambda *_: [], lambda *_, name=name: taken.append(name)) for name in module._IMPLEMENTATIONS}
    monkeypatch.setattr(module, "_IMPLEMENTATIONS", fake)
    monkeypatch.setitem(module.MEASURED, ("cpu", "packed", torch.float32), ("xformers", "torch"))
    monkeypatch.setitem(module.MEASURED, ("cpu", "dense", torch.float32), ("torch", "xformers"))
    ops.attention(q, k, v, lengths=[6])
    ops.attention(q, k, v)
    assert taken == ["xformers", "torch"]


@pytest.mark.parametrize("lengths", [None, [2, 4]])
def test_one_graph(lengths):
    """Traced whole, forward and backward."""
    torch._dynamo.reset()
    q, k, v = make(6)
    packing = None if lengths is None else Packing.of(lengths)
    compiled = torch.compile(
        lambda *x: F.gelu(ops.attention(*x, causal=True, lengths=packing)), fullgraph=True, backend="aot_eager"
    )
    expected = F.gelu(ops.attention(q, k, v, causal=True, lengths=packing))
    out = compiled(q, k, v)
    torch.testing.assert_close(out, expected)
    grads = zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected)), strict=True)
    for grad, truth in grads:
        torch.testing.assert_close(grad, truth)
