"""Image-text retrieval: does an image find its caption, and a caption its image?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..ranks import gather_objects


@torch.no_grad()
def retrieval_at_1(model: Any, batches: Iterable[tuple[Tensor, Tensor]], chunk: int = 1024) -> dict[str, float | int]:
    """R@1 in both directions over all pairs of `batches`.

    A caption that several images share is right for each of them. Under a process group every rank passes its own
    pairs and the retrieval is over all of them.

    Args:
        model: in evaluation mode.
        batches: pairs of normalised images ``[B, 3, H, W]`` and token ids ``[B, L]`` (L may differ).
        chunk: rows of the similarity matrix held at once.
    Returns:
        ``image_to_text`` and ``text_to_image`` in percent, ``pairs``.
    Raises:
        UserError: no pairs.
    """
    device = model.device
    parts = [
        (model.image_embeddings(images.to(device)), model.text_embeddings(ids.to(device)), ids)
        for images, ids in batches
    ]
    parts = _gathered(parts)
    if not parts:
        raise UserError("retrieval: no image-text pairs to score")
    images, texts, ids = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
    _, caption = torch.unique(ids, dim=0, return_inverse=True)
    hits = [
        sum(
            int((caption[(rows @ keys.T).argmax(dim=1)] == wanted).sum())
            for rows, wanted in zip(queries.split(chunk), caption.split(chunk), strict=True)
        )
        for queries, keys in ((images, texts), (texts, images))
    ]
    count = len(caption)
    return {"image_to_text": 100 * hits[0] / count, "text_to_image": 100 * hits[1] / count, "pairs": count}


def _gathered(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The parts of all ranks, in order of rank, on the CPU; ids of different lengths are padded with zeros."""
    parts = [tuple(tensor.cpu() for tensor in part) for part in parts]
    parts = [part for share in gather_objects(parts) for part in share]
    length = max((ids.shape[1] for *_, ids in parts), default=0)
    return [(image, text, F.pad(ids, (0, length - ids.shape[1]))) for image, text, ids in parts]
