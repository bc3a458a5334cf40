"""Image-text retrieval: does an image find its caption, and a caption its image?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from ..ranks import gather_objects


@torch.no_grad()
def retrieval_at_1(model: Any, batches: Iterable[tuple[Tensor, Tensor]], chunk: int = 1024) -> dict[str, float | int]:
    """R@1 in both directions over all pairs of `batches`.

    A caption that several images share is right for each of them. Under a process group every rank passes its own
    pairs and the retrieval is over all of them. Raises a UserError if there are no pairs.

    Args:
        model: in evaluation mode.
        batches: pairs of normalised images ``[B, 3, H, W]`` and token ids ``[B, L]`` (L may differ).
        chunk: rows of the similarity matrix held at once.
    Returns:
        ``image_to_text`` and ``text_to_image`` in percent, ``pairs``.
    """
    device = model.device
    own = [
        (model.image_embeddings(images.to(device)).cpu(), model.text_embeddings(ids.to(device)).cpu(), ids.cpu())
        for images, ids in batches
    ]
    parts = [part for share in gather_objects(own) for part in share]
    if not parts:
        raise UserError("retrieval: no image-text pairs to score")
    images, texts = (torch.cat([part[kind] for part in parts]).to(device) for kind in (0, 1))
    ids = pad_sequence([row for *_, ids in parts for row in ids], batch_first=True).to(device)
    _, caption = torch.unique(ids, dim=0, return_inverse=True)

    def recall(queries: Tensor, keys: Tensor) -> float:
        nearest = torch.cat([(rows @ keys.T).argmax(dim=1) for rows in queries.split(chunk)])
        return 100 * int((caption[nearest] == caption).sum()) / len(caption)

    return {"image_to_text": recall(images, texts), "text_to_image": recall(texts, images), "pairs": len(caption)}
