"""GroupViT's image and text encoders (CVPR 2022, sections 3.1 to 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, TextConfig
from ..ops.attention import BUCKETED, Packing
from .layers import Block, GroupingBlock, LayerNorm, LearnedTokens, Linear, PatchEmbed, TokenMixer, call, quick_gelu


class GroupProjector(nn.Module):
    """Carries the group tokens of one stage to the next: ``[B, G2, C] <- [B, G1, C]``."""

    def __init__(self, width: int, groups_in: int, groups_out: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.mixer = TokenMixer(groups_in, width // 2, groups_out)

    def forward(self, groups: Tensor) -> Tensor:
        return self.mixer(self.norm(groups))


class Stage(nn.Module):
    """Transformer blocks over patches and group tokens, then (but in the last stage) a grouping block.

    Patches and group tokens are one tensor ``[B, N + G, C]``, patches first.
    """

    def __init__(self, config: ModelConfig, depth: int, groups_in: int, groups: int):
        super().__init__()
        self.groups = groups
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(depth))
        self.group_tokens = LearnedTokens(groups, config.width) if groups else None
        self.group_projector = GroupProjector(config.width, groups_in, groups) if groups and groups_in else None
        self.grouping = GroupingBlock(config.width, config.heads, groups) if groups else None

    def tokens(self, patches: Tensor, previous_groups: Tensor | None) -> Tensor:
        """Patches ``[B, N, C]`` with the stage's group tokens appended, ``[B, N + G, C]``."""
        if self.group_tokens is None:
            return patches
        groups = self.group_tokens(patches.dtype).expand(patches.shape[0], -1, -1)
        if self.group_projector is not None:
            groups = groups + self.group_projector(previous_groups)
        return torch.cat([patches, groups], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Patches ``[B, N, C]`` and group tokens ``[B, G, C]``, views."""
        return tokens[:, : tokens.shape[1] - self.groups], tokens[:, tokens.shape[1] - self.groups :]

    def prepare(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the grouping block begins with, see :meth:`GroupingBlock.prepare`."""
        return self.grouping.prepare(*self.split(tokens))


class ImageEncoder(nn.Module):
    """Patch embedding and three stages: :meth:`begin`, the blocks of each stage, between two of them
    :meth:`Stage.prepare`, the grouping attention and :meth:`advance`, then :meth:`end`. They are strung together in
    :mod:`.groupvit` (evaluation) and :mod:`.mixreorg` (training)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.width, config.patch_size)
        self.patch_norm = LayerNorm(config.width)
        self.positions = LearnedTokens(config.patches, config.width)
        groups = (*config.groups, 0)
        self.stages = nn.ModuleList(
            Stage(config, depth, groups[i - 1] if i else 0, groups[i]) for i, depth in enumerate(config.depths)
        )
        self.norm = LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=config.init_std)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Patch tokens ``[B, N, C]`` in `dtype` of images ``[B, 3, H, W]``; positions are interpolated (bicubic)
        where the grid of patches is not the trained one.

        Raises:
            ValueError: H or W is no multiple of the patch size.
        """
        patches = self.patch_norm(self.patch_embed(images.to(dtype)))
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        positions = self.positions(torch.float32)
        if grid != (self.side, self.side):
            positions = resize_positions(positions, *grid)
        return patches + positions.to(dtype)

    def begin(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens of the first stage, of images as for :meth:`embed`."""
        return self.stages[0].tokens(self.embed(images, dtype), None)

    def advance(self, tokens: Tensor, queries: Tensor, collected: Tensor, number: int) -> Tensor:
        """Tokens of the stage after stage `number`, of that stage's tokens ``[B, N + G, C]``, the group tokens that
        collected its patches, and what they collected, ``[B, G, C]`` each."""
        stage, following = self.stages[number], self.stages[number + 1]
        return following.tokens(stage.grouping.finish(queries, collected), stage.split(tokens)[1])

    def end(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Final segments ``[B, G, C]`` of the last stage's tokens, and their mean ``[B, C]``."""
        segments = self.norm(tokens)
        return segments, segments.float().mean(1).to(segments.dtype)


def resize_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings ``[1, N, C]`` of a square grid for one of `height` x `width` patches, bicubic."""
    side = int(positions.shape[1] ** 0.5)
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return grid.flatten(2).mT.contiguous()


class TextEncoder(nn.Module):
    """Causal transformer; a caption's feature stands at its end-of-text token, the highest id of the vocabulary."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.context = config.context
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, causal=True, activation=quick_gelu) for _ in range(config.layers)
        )
        self.norm = LayerNorm(config.width)
        self._initialise(config)

    def _initialise(self, config: TextConfig) -> None:
        """CLIP's initialisation."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        narrow = config.width**-0.5 * (2 * config.layers) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=config.width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=narrow)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * config.width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=narrow)
            for linear in (block.attention.qkv, block.attention.out, block.mlp.fc1, block.mlp.fc2):
                nn.init.zeros_(linear.bias)

    def forward(
        self, ids: Tensor, dtype: torch.dtype, lengths: Sequence[int] | None = None, run: Callable = call
    ) -> Tensor:
        """Features ``[B, C]`` in `dtype` of token ids int64 ``[B, L]``, L at most the context length.

        No padding is computed: all captions lie end to end as rows, and attend within themselves.

        Args:
            lengths: tokens up to and with the end of text, host integers; None: taken from `ids`, for which a GPU is
                waited for.
            run: calls a part with its arguments.
        Raises:
            ValueError: L is beyond the context length, or a length beyond L.
        """
        if ids.shape[1] > self.context:
            raise ValueError(f"captions of {ids.shape[1]} tokens are longer than the context of {self.context}")
        if lengths is None:  # the first occurrence of the highest id; causal: what stands behind it changes nothing
            lengths = (ids.argmax(dim=1) + 1).tolist()
        elif len(lengths) != len(ids) or max(lengths) > ids.shape[1]:
            raise ValueError(
                f"lengths of {len(lengths)} captions up to {max(lengths)} do not fit ids {list(ids.shape)}"
            )
        packing = Packing.of(lengths, ids.device, bucket=ids.device.type in BUCKETED)
        x = self.token_embedding(packing.pack(ids)) + self.position_embedding(packing.position)
        x = x.to(dtype)  # [1, S, C]
        for block in self.blocks:
            x = run(block, x, (None, None), packing)
        return run(self.norm, x[0].index_select(0, packing.last))
