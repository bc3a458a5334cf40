"""Mixed segmentation loss: bound by reading the assignment of patches and writing its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixreorg_fast import ops
from mixreorg_fast.ops.patch_mixing import MixPlan

from .harness import DEVICE, DTYPE, ON_GPU, Case, Work, matrix

FIRST_GROUPS, SECOND_GROUPS, WIDTH, GROUP_SIZE = 64, 8, 256, 4
# images, patches, dtype of the assignments: the model at 224 px and 448 px; the grouping attention returns fp32.
SHAPES = [(1024, 196, DTYPE), (1024, 196, torch.float32), (256, 784, DTYPE)] if ON_GPU else [(32, 196, torch.float32)]


def eager(first, second, segments, texts, plan, scale):
    logits = eager_logits(first, second, segments, texts, scale)
    return F.cross_entropy(logits.flatten(0, 1), plan.labels.flatten())


def eager_logits(first, second, segments, texts, scale):
    """As the formula reads: every patch's assignment to the final segments, times their cosines with the texts."""
    assignment = first.mT @ second.mT  # [B, N, G2]
    texts = texts.unflatten(0, (-1, GROUP_SIZE)).repeat_interleave(GROUP_SIZE, dim=0)  # [B, K, D]
    cosines = (segments @ texts.mT).to(assignment.dtype)  # [B, G2, K]
    return assignment @ cosines * scale  # [B, N, K]


def case(images: int, patches: int, dtype: torch.dtype) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device=DEVICE, generator=generator)

        first = random(images, FIRST_GROUPS, patches).softmax(1).to(dtype)
        second = random(images, SECOND_GROUPS, FIRST_GROUPS).softmax(1).to(dtype)
        segments = F.normalize(random(images, SECOND_GROUPS, WIDTH), dim=-1).to(DTYPE)
        texts = F.normalize(random(images, WIDTH), dim=-1).to(DTYPE)
        plan = MixPlan.sample(images, patches, GROUP_SIZE, generator=generator)
        scale = torch.tensor([30.0], device=DEVICE, requires_grad=True)
        return *(x.requires_grad_() for x in (first, second, segments, texts)), plan, scale

    assignments = images * FIRST_GROUPS * (patches + SECOND_GROUPS) * dtype.itemsize
    embeddings = images * (SECOND_GROUPS + 1) * WIDTH * DTYPE.itemsize
    read = assignments + embeddings
    source = 4 * images * patches
    return Case(
        op="mixed_segmentation_loss",
        shape=f"{images}x{FIRST_GROUPS}x{patches} G2={SECOND_GROUPS} K={GROUP_SIZE}",
        batch=images,
        inputs=inputs,
        implementations={
            "eager": eager,
            "triton": lambda *x: ops.mixed_segmentation_loss(*x, impl="triton"),
        },
        # Whatever backward reads again, forward could have kept: its floor is the gradients it writes.
        work={"fwd": Work(read + source), "bwd": Work(read), "fwd+bwd": Work(2 * read + source)},
        dtype=dtype,
    )


@matrix([case(*shape) for shape in SHAPES])
def test_mixed_segmentation_loss(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
