"""A model that is cheap, deterministic and depends on its input; photos and masks drawn from a seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mixreorg_fast.config import InferenceConfig
from mixreorg_fast.models import Segments


class FakeTokenizer:
    """Bytes as tokens."""

    def encode(self, texts: list[str], context: int) -> tuple[Tensor, list[int]]:
        rows = [list(text.encode())[-context:] for text in texts]
        return torch.tensor([row + [0] * (context - len(row)) for row in rows]), [len(row) for row in rows]


class FakeModel(nn.Module):
    """Segments by patch colour; every image is treated alone, so batching must not change a thing."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inference, tokenizer = InferenceConfig(), FakeTokenizer()
    config = SimpleNamespace(patch_size=8, text=SimpleNamespace(context=40))

    def __init__(self, groups: int = 5, dim: int = 16):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.to_groups = nn.Parameter(4 * torch.randn(groups, 3, generator=draw))
        self.groups = nn.Parameter(torch.randn(groups, dim, generator=draw))
        self.words = nn.Parameter(torch.randn(256, dim, generator=draw))
        self.colour = nn.Parameter(torch.randn(3, dim, generator=draw))

    @property
    def device(self) -> torch.device:
        return self.words.device

    def segments(self, images: Tensor) -> Segments:
        patches = F.avg_pool2d(images, self.config.patch_size)
        maps = torch.einsum("gc,bchw->bghw", self.to_groups, patches).softmax(dim=1)
        mean = images.mean(dim=(2, 3)) @ self.colour  # [B, D]
        return Segments(maps, F.normalize(self.groups + mean[:, None], dim=-1), F.normalize(mean, dim=-1))

    def image_embeddings(self, images: Tensor) -> Tensor:
        return self.segments(images).image

    def text_embeddings(self, ids: Tensor, *, normalise: bool = True) -> Tensor:
        embeddings = (self.words[ids] * (ids > 0)[..., None]).sum(dim=1)
        return F.normalize(embeddings, dim=-1) if normalise else embeddings

    def logit_multiplier(self) -> Tensor:
        return torch.tensor(10.0)


def draw_photo(path: Path, size: tuple[int, int], seed: int) -> Image.Image:
    """A few coloured rectangles, so that there is something to segment."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), rng.integers(256, size=3), dtype=np.uint8)
    for _ in range(6):
        y, x = rng.integers(size[1]), rng.integers(size[0])
        pixels[y : y + size[1] // 2, x : x + size[0] // 2] = rng.integers(256, size=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.save(path)
    return image


def draw_mask(path: Path, size: tuple[int, int], ids: list[int], seed: int) -> np.ndarray:
    """A palette PNG whose values are drawn from `ids` in blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice(np.array(ids, dtype=np.uint8), size=(-(-size[1] // 8), -(-size[0] // 8)))
    mask = blocks.repeat(8, axis=0).repeat(8, axis=1)[: size[1], : size[0]].copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(list(range(256)) * 3)
    picture.save(path)
    return mask
