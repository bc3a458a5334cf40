"""The ``groupvit`` decoding to the letter, with the dense volume of classes: the oracle of tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mixreorg_fast.inference.windows import Box, score_channels


def decode_groupvit_reference(
    maps: Tensor,
    scores: Tensor,
    boxes: Sequence[Box],
    network: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None = None,
) -> Tensor:
    """Labels of one photo, int64 ``[H, W]``; arguments as of :func:`~mixreorg_fast.inference.windows.decode`."""
    channels = score_channels(scores, threshold)
    total = channels.new_zeros(1, channels.shape[2], *network)
    windows = channels.new_zeros(1, 1, *network)
    for map_, channel, box in zip(maps, channels, boxes, strict=True):
        fine = F.interpolate(map_[None], size=(box.height, box.width), mode="bilinear", align_corners=False)[0]
        one_hot = F.one_hot(fine.argmax(dim=0), fine.shape[0]).to(channel.dtype)  # [height, width, G]
        box.of(total[0]).add_((one_hot @ channel).permute(2, 0, 1))
        box.of(windows).add_(1)
    return F.interpolate(total / windows, size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
