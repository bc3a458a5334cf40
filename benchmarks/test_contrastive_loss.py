"""Contrastive loss: bound by matmuls, one for the logits and two for the gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixreorg_fast import ops
from mixreorg_fast.ops.contrastive_loss import contrastive_loss_reference

from .harness import DEVICE, DTYPE, ON_GPU, Case, Work, matrix

WIDTH = 256
# batch, prompts per image (0: one caption): a large batch on one device, GroupViT's global batch, and its multi-label
# loss over noun prompts.
SHAPES = [(32768, 0), (4096, 0), (4096, 3)] if ON_GPU else [(512, 0), (256, 3)]


def eager(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The usual code: the logit scale on the features, two cross-entropies over one matrix of logits."""
    if text.dim() == 3:
        return contrastive_loss_reference(image, text, scale.to(image.dtype))
    logits = image * scale.to(image.dtype) @ text.mT
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def case(batch: int, prompts: int) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        image = torch.randn(batch, WIDTH, device=DEVICE, generator=generator)
        size = (batch, prompts, WIDTH) if prompts else (batch, WIDTH)
        text = torch.randn(size, device=DEVICE, generator=generator)
        features = (F.normalize(x, dim=-1).to(DTYPE).requires_grad_() for x in (image, text))
        return *features, torch.tensor([30.0], device=DEVICE, requires_grad=True)

    texts = batch * max(prompts, 1)
    product = 2 * batch * texts * WIDTH
    features = (batch + texts) * WIDTH * DTYPE.itemsize
    return Case(
        op="contrastive_loss",
        shape=f"{batch}x{WIDTH}" + (f" P={prompts}" if prompts else ""),
        batch=batch,
        inputs=inputs,
        implementations={
            "eager": eager,
            "triton": lambda image, text, scale: ops.contrastive_loss(image, text, scale, impl="triton"),
        },
        work={
            "fwd": Work(features, product),
            "bwd": Work(2 * features, 2 * product),
            "fwd+bwd": Work(2 * features, 3 * product),
        },
    )


@matrix([case(*shape) for shape in SHAPES])
def test_contrastive_loss(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
