"""GroupViT's image encoder (CVPR 2022, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import ModelConfig
from .layers import Block, GroupingBlock, LayerNorm, LearnedTokens, Linear, PatchEmbed, TokenMixer, call


class Stage(nn.Module):
    """Transformer blocks over patches and group tokens, then (but in the last stage) a grouping block.

    Patches and group tokens are one tensor ``[B, N + G, C]``, patches first.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        groups = config.groups[number] if number < len(config.groups) else 0
        self.groups = groups
        self.first = sum(config.depths[:number])  # its first block's number among the blocks of all stages
        blocks = (Block(config.width, config.heads) for _ in range(config.depths[number]))
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.group_tokens = LearnedTokens(groups, config.width) if groups else None
        self.group_projector = None
        if groups and number:  # carries the group tokens of the stage before to this one, [B, G2, C] <- [B, G1, C]
            mixer = TokenMixer(config.groups[number - 1], config.width // 2, groups)
            self.group_projector = nn.Sequential(OrderedDict(norm=LayerNorm(config.width), mixer=mixer))
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
        assert self.grouping is not None, "the last stage has no grouping block"
        return self.grouping.prepare(*self.split(tokens))


class ImageEncoder(nn.Module):
    """Patch embedding and three stages; a grouping block after each of the first two merges patches into segments.

    :meth:`forward` is the evaluation network. Training (:mod:`.mixreorg`) has its own walk between `begin` and
    `finish`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.width, config.patch_size)
        self.patch_norm = LayerNorm(config.width)
        self.positions = LearnedTokens(config.patches, config.width)
        self.stages = cast("Sequence[Stage]", nn.ModuleList(Stage(config, i) for i in range(len(config.depths))))
        self.norm = LayerNorm(config.width)
        # Stochastic depth grows linearly with the block's number, as in DeiT.
        depth = sum(config.depths)
        self.drop_rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=config.init_std)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Final segments ``[B, G2, C]`` and their mean ``[B, C]``, in the dtype of the weights, of images
        ``[B, 3, H, W]``; and fp32 soft maps of patches to the segments of both stages, ``[B, G1 or G2, h, w]``."""
        tokens = self.run_blocks(self.begin(images, self.norm.weight.dtype), 0)
        segments, pooled, (first, second) = self.finish(tokens, self.assign)
        height = images.shape[2] // self.config.patch_size
        second = second @ first  # [B, G2, N] <- [B, G2, G1] @ [B, G1, N]
        return segments, pooled, (first.unflatten(2, (height, -1)), second.unflatten(2, (height, -1)))

    def assign(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The grouping attention of evaluation: no noise, a hard aggregation and a soft assignment for the maps."""
        hard, tau = self.config.hard_assignment, self.config.tau
        return ops.grouping_attention(q, k, v, hard=hard, tau=tau, return_assignment="soft")

    def begin(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens of the first stage, see :meth:`embed`."""
        return self.stages[0].tokens(self.embed(images, dtype), None)

    def embed(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Patch tokens ``[B, N, C]`` in `dtype` of images ``[B, 3, H, W]``; positions are interpolated (bicubic)
        where the grid of patches is not the trained one."""
        patches = self.patch_norm(self.patch_embed(images.to(dtype)))
        patch, trained = self.config.patch_size, self.config.image_size
        positions = self.positions(torch.float32)
        if torch.compiler.is_exporting() or images.shape[2:] != (trained, trained):  # one program for any grid
            positions = resize_positions(positions, images.shape[2] // patch, images.shape[3] // patch)
        return patches + positions.to(dtype)

    def run_blocks(
        self,
        tokens: Tensor,
        number: int,
        start: int = 0,
        end: int | None = None,
        drops: Tensor | None = None,
        run: Callable = call,
    ) -> Tensor:
        """Blocks `start` to `end` of stage `number`, on tokens ``[B, N + G, C]``.

        Args:
            drops: stochastic depth, fp32 ``[2, blocks, B or more]``: the factors of both residuals of every block.
            run: calls a block with its arguments.
        """
        stage = self.stages[number]
        for i in range(start, len(stage.blocks) if end is None else end):
            block = stage.first + i
            keep = (None, None)
            if drops is not None and self.drop_rates[block] > 0:
                keep = drops[:, block, : len(tokens)].unbind()
            tokens = run(stage.blocks[i], tokens, keep)
        return tokens

    def finish(
        self, tokens: Tensor, assign: Callable, drops: Tensor | None = None, run: Callable = call
    ) -> tuple[Tensor, Tensor, list]:
        """All that follows the blocks of stage 1: both grouping blocks, the blocks of stages 2 and 3, the last norm.

        Args:
            assign: the grouping attention; returns, for ``(stage, q, k, v)``, the collected patches ``[B, G, C]`` and
                the assignment in any form.
            drops, run: as of :meth:`run_blocks`.
        Returns:
            final segments ``[B, G2, C]``, their mean ``[B, C]``, and the assignments of both stages.
        """
        assignments = []
        for number in range(len(self.stages) - 1):
            queries, *qkv = run(self.stages[number].prepare, tokens)
            collected, assignment = assign(number, *qkv)
            assignments.append(assignment)
            tokens = run(self.advance, tokens, queries, collected, number)
            tokens = self.run_blocks(tokens, number + 1, drops=drops, run=run)
        return *run(self.end, tokens), assignments

    def advance(self, tokens: Tensor, queries: Tensor, collected: Tensor, number: int) -> Tensor:
        """Tokens of stage `number` + 1 from those of stage `number`, ``[B, N + G, C]``, its group tokens `queries` and
        the output `collected` of its grouping attention, both ``[B, G, C]``."""
        stage, following = self.stages[number], self.stages[number + 1]
        assert stage.grouping is not None, "the last stage has no grouping block"
        return following.tokens(stage.grouping.finish(queries, collected), stage.split(tokens)[1])

    def end(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Final segments ``[B, G, C]`` of the last stage's tokens, and their mean ``[B, C]``."""
        segments = self.norm(tokens)
        return segments, segments.float().mean(1).to(segments.dtype)


def resize_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings ``[1, N, C]`` of a square grid, bicubic, as ``[1, height * width, C]``."""
    side = int(positions.shape[1] ** 0.5)
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return grid.flatten(2).mT.contiguous()
