"""The smallest model and batches that have every part, for tests of all packages."""

from __future__ import annotations

from typing import Any

import torch

from mixreorg_fast.config import Config, merged, parse_config
from mixreorg_fast.models import Batch

VOCABULARY = 60


def tiny_config(**changes: Any) -> Config:
    """A run of a model of 30 thousand parameters on 32 px images; `changes` by section."""
    base = {
        "model": {
            "image_size": 32,
            "patch_size": 8,
            "width": 24,
            "heads": 2,
            "depths": [3, 1, 1],
            "groups": [6, 3],
            "embed_dim": 16,
            "projection_hidden": 32,
            "drop_path": 0.0,
            "text": {"width": 16, "heads": 2, "layers": 2, "context": 12, "vocab_size": VOCABULARY},
        },
        "mixing": {"context_blocks": 1},
        "train": {"batch": 8, "precision": "fp32", "steps": 4, "warmup_steps": 0},
    }
    return parse_config(merged(base, changes))


def random_batch(config: Config, images: int, *, seed: int = 0, nouns: int = 0) -> Batch:
    """Random images and captions of varied length, the end token the highest id."""
    generator = torch.Generator().manual_seed(seed)
    size, context = config.model.image_size, config.model.text.context

    def captions(count: int) -> tuple[torch.Tensor, list[int]]:
        lengths = torch.randint(3, context + 1, (count,), generator=generator).tolist()
        ids = torch.randint(1, VOCABULARY - 1, (count, context), generator=generator)
        for row, length in zip(ids, lengths, strict=True):
            row[length - 1] = VOCABULARY - 1
            row[length:] = 0
        return ids, lengths

    ids, lengths = captions(images)
    batch = Batch(torch.randn(images, 3, size, size, generator=generator), ids, lengths, seed=1234 + seed)
    if nouns:
        noun_ids, batch.noun_lengths = captions(images * nouns)
        batch.noun_ids = noun_ids.unflatten(0, (images, nouns))
    return batch


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values in every parameter, of a size at which nothing is near zero or saturated.

    Freshly initialised, group tokens are so small that LayerNorm enlarges rounding errors a thousandfold.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("logit_scale"):
            continue
        if parameter.dim() == 1 and name.endswith("weight"):  # of a normalisation
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2))
