"""No kernel accesses memory out of bounds: every tensor lies against an unreadable page, at awkward sizes, with NaN."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mixreorg_fast import ops
from mixreorg_fast.kernels import contrastive_loss as contrastive_kernels
from mixreorg_fast.kernels.settings import LogitBlock
from mixreorg_fast.ops.contrastive_blocks import TRITON
from mixreorg_fast.ops.mixed_segmentation_loss import _mixed_segmentation
from mixreorg_fast.ops.patch_mixing import MixPlan

from .guarded import Guard, assert_within_bounds, guarded

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
pytestmark = pytest.mark.skipif(
    OLD_TRITON and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6 interprets with NumPy < 2.4"
)

MIXING = [(4, 5, 16, 2), (6, 13, 100, 3), (3, 1, 7, 1)]  # images, patches, channels, group size
GROUPING = [(1, 64, 196, 16), (2, 7, 13, 100), (1, 5, 300, 8), (1, 1, 1, 1), (1, 128, 17, 16)]  # images, G, N, channels
CONTRASTIVE = [(5, 0, 16), (131, 0, 20), (37, 3, 8)]  # batch, prompts (0: text is [B, D]), width
MIXED_SEGMENTATION = [  # images, G1, N, G2, D, group size
    (2, 64, 49, 8, 32, 2),
    (6, 7, 13, 3, 20, 3),
    (9, 5, 9, 17, 16, 9),
    (2, 1, 1, 1, 1, 2),
]
DECODING = [  # images, groups, (h, w), (H, W), classes
    (2, 3, (3, 9), (13, 131), 5),
    (1, 2, (4, 4), (70, 6), 3),
    (1, 2, (9, 12), (4, 5), 5),
    (1, 1, (1, 1), (3, 2), 300),
]


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype)


def with_nan(x: Tensor) -> Tensor:
    """NaN in the first row of the first image and in the last row of the last."""
    x = x.clone()
    x[0, 0] = x[-1, -1] = float("nan")
    return x


def run(guard: Guard, function, *inputs: Tensor) -> None:
    """Forward and backward, everything guarded."""
    inputs = [guard(x).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outputs, inputs, [guard(torch.randn_like(x)) for x in outputs], allow_unused=True)


def plan_of(guard: Guard, images: int, patches: int, group_size: int) -> MixPlan:
    plan = MixPlan.sample(images, patches, group_size, seed=guard(torch.tensor(1)), impl="triton")
    return MixPlan(guard(plan.source), guard(plan.inverse), group_size)


def patch_mixing(guard: Guard, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    images, patches, channels, group_size = shape
    plan = plan_of(guard, images, patches, group_size)
    x, y = (random(images, patches, channels, dtype=dtype) for _ in range(2))
    run(guard, lambda x: ops.patch_mix(x, plan, impl="triton"), x)
    run(guard, lambda x: ops.patch_restore(x, plan, impl="triton"), with_nan(x))
    run(guard, lambda x, y: ops.patch_blend(x, y, plan, 0.3, impl="triton"), x, y)
    run(guard, lambda x: ops.patch_mix(x, plan, impl="triton"), random(images, channels, patches).mT)


def whole_tokens(guard: Guard, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    images, patches, channels, group_size = shape
    plan = plan_of(guard, images, patches, group_size)
    for groups in (3, 0):
        one, two, learned = (
            random(rows, tokens, channels, dtype=dtype)
            for rows, tokens in ((images, patches + groups), (2 * images, patches + groups), (1, groups))
        )
        run(guard, lambda x: ops.mix_tokens(x, plan, impl="triton"), with_nan(one))
        run(guard, lambda x, own: ops.mix_tokens(x, plan, own, impl="triton"), one, learned)
        run(guard, lambda x: ops.blend_tokens(x, plan, 0.3, impl="triton"), with_nan(two))
        for keep in (True, False):
            run(guard, lambda x: ops.restore_tokens(x, plan, keep_mixed=keep, impl="triton"), two)  # noqa: B023
    ops.stochastic_depth(guard(torch.tensor(1)), [0.1, 0.2, 0.3], images, branches=3, impl="triton")


def grouping_attention(guard: Guard, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    images, groups, patches, channels = shape
    q, k, v = (with_nan(random(images, rows, channels, dtype=dtype)) for rows in (groups, patches, patches))
    for hard in (True, False):
        for assignment in ("none", "soft", "used"):
            settings = {"hard": hard, "return_assignment": assignment, "seed": 3 if assignment != "soft" else None}
            run(guard, lambda q, k, v: ops.grouping_attention(q, k, v, impl="triton", **settings), q, k, v)  # noqa: B023


def contrastive_loss(guard: Guard, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    batch, prompts, width = shape
    image, text = random(batch, width, dtype=dtype), random(batch, *[prompts] * bool(prompts), width, dtype=dtype)
    scale = torch.tensor([10.0])

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return ops.contrastive_loss(image, text, scale, impl="triton")

    run(guard, loss, image, text, scale)
    run(guard, loss, with_nan(image), with_nan(text), scale)
    # A ring's hops and a rank's rows: blocks whose positives lie elsewhere, one gradient, small strips.
    texts, scale = guard(text.reshape(-1, width)), guard(scale[0])
    for both in (False, True):
        contrastive_kernels.STRIP_BYTES = contrastive_kernels.PARTIALS_BYTES = 0
        row_lse, column_lse = TRITON.log_sum_exp(guard(image), texts, scale, both)
        column_lse = column_lse if both else guard(torch.zeros(len(texts)))
        for first_row in (0, 3, batch):
            block = LogitBlock(1, max(1, prompts), first_row, both)
            TRITON.gradient(guard(image), texts, row_lse, column_lse, scale, block)


def mixed_segmentation_loss(guard: Guard, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    images, first_groups, patches, second_groups, width, group_size = shape
    plan = plan_of(guard, images, patches, group_size)
    inputs = [
        random(images, first_groups, patches, dtype=dtype),
        random(images, second_groups, first_groups, dtype=dtype),
        random(images, second_groups, width, dtype=dtype),
        random(images, width, dtype=dtype),
    ]

    def losses(*tensors: Tensor) -> Tensor:  # of each image: nothing lies between the kernel and the guarded gradient
        *tensors, scale = tensors
        out = _mixed_segmentation(*tensors, plan.source, scale.reshape(()), group_size)
        return out[0] if isinstance(out, tuple) else out

    scale = torch.tensor([10.0])
    run(guard, losses, *inputs, scale)
    run(guard, losses, *map(with_nan, inputs), scale)
    run(guard, lambda *x: ops.mixed_segmentation_loss(*x[:4], plan, x[4], impl="triton"), *inputs, scale)


def decode_segments(guard: Guard, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    images, groups, cells, size, classes = shape
    maps, scores = random(images, groups, *cells, dtype=dtype), random(images, groups, classes, dtype=dtype)
    ops.decode_segments(guard(with_nan(maps)), guard(with_nan(scores)), size, impl="triton")
    threshold = guard(torch.full((images,), 0.5))
    apart = [guard(x.transpose(-1, -2).contiguous()).transpose(-1, -2) for x in (maps, scores)]
    ops.decode_segments(*apart, size, background_threshold=threshold, impl="triton")


CASES = {
    f"{function.__name__}-{str(shape).replace(' ', '')}-{name}": partial(function, shape=shape, **settings)
    for function, shapes, variants in (
        (patch_mixing, MIXING, {"fp32": {}}),
        (whole_tokens, MIXING, {"fp32": {}}),
        (grouping_attention, GROUPING, {"fp32": {}, "bf16": {"dtype": torch.bfloat16}}),
        (contrastive_loss, CONTRASTIVE, {"fp32": {}}),
        (mixed_segmentation_loss, MIXED_SEGMENTATION, {"fp32": {}}),
        (decode_segments, DECODING, {"fp32": {}}),
    )
    for shape in shapes
    for name, settings in variants.items()
}


def run_case(guard: Guard, name: str) -> None:
    torch.manual_seed(0)
    CASES[name](guard)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_access_out_of_bounds(name):
    assert_within_bounds(run_case, name)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, first):
    tl.store(out_ptr, tl.load(x_ptr + first))


def read_outside(guard: Guard, first: int) -> None:
    _copy_kernel[(1,)](guard(torch.zeros(3)), guard(torch.zeros(1)), first)


def test_the_guard_catches_one_element_and_names_the_line():
    assert_within_bounds(read_outside, 2, sides=["end"])
    assert_within_bounds(read_outside, 0, sides=["start"])
    for side, first in (("end", 3), ("start", -1)):
        with pytest.raises(AssertionError, match=f"out of bounds at a tensor's {side}(.|\n)*in _copy_kernel"):
            assert_within_bounds(read_outside, first, sides=[side])


def test_guarded_tensors_keep_values_and_strides():
    x = torch.arange(24.0).view(2, 3, 4)
    for view in (x, x.mT, x[:, 1:, ::2], x[:, :, :1].expand(2, 3, 5)):
        copy = guarded(view, "end")
        assert torch.equal(copy, view) and copy.stride() == view.stride()
