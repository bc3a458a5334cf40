"""What the loaders yield: the image-text pairs of one micro-step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Pairs:
    """Image-text pairs of one rank."""

    images: Tensor  # [B, 3, S, S] fp32, normalised RGB
    ids: Tensor  # [B, context] int64, zero-padded
    lengths: list[int]  # tokens per caption with start and end
    position: int  # run-global position of this rank's first sample
    keys: list[str]
    noun_ids: Tensor | None = None  # [B, P, context] int64: P noun prompts per image, with loss.multi_label
    noun_lengths: list[int] | None = None  # B * P, image by image
