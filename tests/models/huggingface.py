"""Hugging Face GroupViT models whose every parameter and buffer is random: oracles that share no code with ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the Hugging Face extra")

VOCABULARY = 60
SMALL = {
    "projection_dim": 16,
    "projection_intermediate_dim": 48,
    "vision_config": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_attention_heads": 3,
        "depths": [2, 1, 1],
        "num_hidden_layers": 4,
        "num_group_tokens": [12, 5, 0],
        "num_output_groups": [12, 5, 5],
    },
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 12,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1,
    },
}


def build(config: dict) -> transformers.GroupViTModel:
    return transformers.GroupViTModel(transformers.GroupViTConfig(**config)).eval()


def random_model(config: dict, seed: int = 0) -> transformers.GroupViTModel:
    """A model with random values everywhere; fresh ones have zeros where a wrong mapping would not show."""
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name == "logit_scale":
            value.fill_(2.5)
        elif name.endswith("num_batches_tracked"):
            value.fill_(1234 + len(name))
        else:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.dim() == 1:
                value.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("weight") and "embedding.weight" not in name:
                # Queries and keys a little larger, so that the assignments differ from patch to patch.
                gain = 2.0 if "assign" in name else 1.0
                value.copy_(gain * noise * value[0].numel() ** -0.5)
            else:  # embeddings, positions, group tokens
                value.copy_(noise)
    return model


def random_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Coarse random fields with fine noise: neighbouring patches are alike, as in photos."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 5, 5, generator=generator)
    fine = torch.randn(batch, 3, height, width, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") + 0.3 * fine


def random_ids(batch: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Texts that end at different places with the highest id, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary - 1, (batch, length), generator=generator)
    for row, end in zip(ids, torch.randint(2, length, (batch,), generator=generator), strict=True):
        row[end] = vocabulary - 1
        row[end + 1 :] = 0
    return ids


def state_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit: names, shapes, dtypes and values."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
