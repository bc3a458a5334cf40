"""Decoding of segments to pixel labels: both implementations against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixreorg_fast import ops
from mixreorg_fast.ops.decode_segments import decode_segments_reference

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # batch, groups, (h, w), (H, W), classes
    (2, 8, (3, 9), (26, 131), 21),  # the model's segments; a width that is a prime, blocks of 8 rows
    (1, 7, (4, 4), (70, 64), 3),  # one image, a prime number of groups, blocks of 16 rows cut off by the border
    (3, 1, (5, 6), (5, 6), 1),  # one group, one class, nothing to upsample
    (2, 3, (9, 12), (4, 5), 5),  # downsampling
    (1, 2, (1, 1), (3, 2), 300),  # a map of one cell; more classes than one block of them
    (1, 64, (2, 2), (4, 3), 4),  # the groups of stage 1
]


def make(shape, dtype, device):
    batch, groups, cells, _, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    maps = torch.rand(batch, groups, *cells, device=device, generator=generator).to(dtype)
    scores = torch.rand(batch, groups, classes, device=device, generator=generator).to(dtype)
    return maps, scores


def clear_pixels(maps, size, margin=1e-5):
    """Where the truth's largest map leads by more than rounding can turn around."""
    upsampled = F.interpolate(maps.double(), size=size, mode="bilinear", align_corners=False)
    if maps.shape[1] == 1:
        return torch.ones_like(upsampled[:, 0], dtype=torch.bool)
    first, second = upsampled.topk(2, dim=1).values.unbind(1)
    return first - second > margin


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_the_truths(shape, dtype, impl, device, poisoned_memory):
    maps, scores = make(shape, dtype, device)
    size = shape[3]
    clear = clear_pixels(maps, size)
    assert clear.double().mean() > 0.99  # the margin excludes next to nothing
    threshold = torch.full((len(maps),), 0.7, device=device)
    labels = ops.decode_segments(maps, scores, size, background_threshold=threshold, impl=impl)
    truth = decode_segments_reference(maps, scores, size, threshold, upcast=torch.float64)
    assert labels.dtype == torch.int64
    assert torch.equal(labels[clear], truth[clear])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_thresholds_decide_what_is_background(impl, device):
    maps, scores = make((2, 4, (3, 3), (6, 6), 5), torch.float32, device)
    without = ops.decode_segments(maps, scores, (6, 6), impl=impl)

    def decode(threshold):
        return ops.decode_segments(maps, scores, (6, 6), background_threshold=threshold, impl=impl)

    assert torch.equal(decode(0.0), without + 1)
    assert not decode(2.0).any()
    per_image = decode(torch.tensor([2.0, 0.0], device=device))
    assert not per_image[0].any()
    assert torch.equal(per_image[1], without[1] + 1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ties_take_the_lowest_segment_and_class(impl, device):
    maps = torch.full((1, 3, 2, 2), 0.5, device=device)
    scores = torch.tensor([[[0.0, 1.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]], device=device)
    assert (ops.decode_segments(maps, scores, (5, 5), impl=impl) == 1).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_are_read_in_place(impl, device):
    maps, scores = make((2, 8, (4, 5), (16, 20), 6), torch.float32, device)
    truth = ops.decode_segments(maps, scores, (16, 20), impl="torch")
    cells_first = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    classes_apart = scores.repeat_interleave(2, dim=2)[:, :, ::2]
    assert torch.equal(ops.decode_segments(cells_first, classes_apart, (16, 20), impl=impl), truth)


def test_registration_passes_opcheck(device):
    maps, scores = make((1, 2, (2, 3), (4, 5), 2), torch.float32, device)
    for threshold in (None, torch.full((1,), 0.5, device=device)):
        torch.library.opcheck(torch.ops.mixreorg.decode_segments.default, (maps, scores, threshold, 4, 5))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_gradient_is_promised(impl, device):
    maps, scores = make((1, 2, (2, 3), (4, 5), 2), torch.float32, device)
    assert not ops.decode_segments(maps.requires_grad_(), scores, (4, 5), impl=impl).requires_grad


def test_errors_name_what_is_wrong(device):
    maps, scores = make((2, 4, (3, 3), (6, 6), 5), torch.float32, device)
    with pytest.raises(ValueError, match=r"decode_segments: expected .* got \[2, 4, 3, 3\] and \[2, 3, 5\]"):
        ops.decode_segments(maps, scores[:, :3], (6, 6))
    with pytest.raises(ValueError, match=r"decode_segments: size must be two positive numbers, got \(0, 6\)"):
        ops.decode_segments(maps, scores, (0, 6))
    with pytest.raises(ValueError, match="background_threshold must be a number"):
        ops.decode_segments(maps, scores, (6, 6), background_threshold=torch.zeros(3, device=device))
    with pytest.raises(RuntimeError, match="decode_segments: impl='triton' cannot run on float64"):
        ops.decode_segments(maps.double(), scores, (6, 6), impl="triton")


@pytest.mark.gpu
def test_indices_past_31_bits(device, gpu_memory):
    gpu_memory(24)
    batch = 8_200  # x 512 x 512 pixels: 2.1e9
    maps = torch.rand(batch, 2, 4, 4, device=device)
    scores = torch.rand(batch, 2, 3, device=device)
    labels = ops.decode_segments(maps, scores, (512, 512), impl="triton")
    clear = clear_pixels(maps[-1:], (512, 512))
    truth = decode_segments_reference(maps[-1:], scores[-1:], (512, 512), upcast=torch.float64)
    assert torch.equal(labels[-1:][clear], truth[clear])
