"""Segment decoding: labels are all that must be written."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixreorg_fast import ops
from mixreorg_fast.ops.decode_segments import decode_segments_reference

from .harness import DEVICE, ON_GPU, Case, Work, matrix

# batch, groups, map, photo, classes: photos of a 448 px network; a quarter on a CPU.
SHAPES = [(64, 8, (28, 37), (512, 683), 150)] if ON_GPU else [(1, 8, (14, 19), (256, 341), 150)]


def dense(maps: torch.Tensor, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The usual decoding: a one-hot map of segments times their class scores, [B, H, W, T], and its arg-max."""
    upsampled = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    one_hot = F.one_hot(upsampled.argmax(dim=1), maps.shape[1]).to(scores.dtype)  # [B, H, W, G]
    return (one_hot.flatten(1, 2) @ scores).argmax(dim=2).unflatten(1, size)


def case(batch: int, groups: int, cells: tuple[int, int], size: tuple[int, int], classes: int) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        maps = torch.rand(batch, groups, *cells, device=DEVICE, generator=generator)
        scores = torch.rand(batch, groups, classes, device=DEVICE, generator=generator)
        return maps, scores

    labels = 8 * batch * size[0] * size[1]
    read = 4 * batch * groups * (cells[0] * cells[1] + classes)
    return Case(
        op="decode_segments",
        shape=f"{batch}x{groups}x{cells[0]}x{cells[1]} to {size[0]}x{size[1]} T={classes}",
        batch=batch,
        dtype=torch.float32,
        inputs=inputs,
        implementations={
            "eager": lambda maps, scores: decode_segments_reference(maps, scores, size),
            "triton": lambda maps, scores: ops.decode_segments(maps, scores, size, impl="triton"),
            "dense": lambda maps, scores: dense(maps, scores, size),
        },
        work={"fwd": Work(labels + read)},
        modes=("fwd",),
        bandwidth="write",
    )


@matrix([case(*shape) for shape in SHAPES])
def test_decoding(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
