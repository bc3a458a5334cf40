"""GroupViT's text encoder, which is CLIP's (CVPR 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..ops.attention import BUCKETED, Packing
from .layers import Block, LayerNorm, call, quick_gelu


class TextEncoder(nn.Module):
    """Causal transformer; a caption's feature stands at its end-of-text token, the highest id of the vocabulary."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.context = config.context
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        blocks = (Block(config.width, config.heads, causal=True, activation=quick_gelu) for _ in range(config.layers))
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.norm = LayerNorm(config.width)
        # CLIP's initialisation
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        narrow = config.width**-0.5 * (2 * config.layers) ** -0.5
        stds = (config.width**-0.5, narrow, (2 * config.width) ** -0.5, narrow)
        for block in self.blocks:
            linears = (block.attention.qkv, block.attention.out, block.mlp.fc1, block.mlp.fc2)
            for linear, std in zip(linears, stds, strict=True):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(
        self, ids: Tensor, dtype: torch.dtype, lengths: Sequence[int] | None = None, run: Callable = call
    ) -> Tensor:
        """Features ``[B, C]`` in `dtype` of token ids int64 ``[B, L]``, L at most the context length.

        Padding costs nothing: all captions lie end to end as rows, and each attends within itself.

        Args:
            lengths: tokens up to and with the end of text, host integers; None: read from `ids`, which waits for a GPU.
            run: calls a block with its arguments.
        """
        if ids.shape[1] > self.context:
            raise ValueError(f"captions of {ids.shape[1]} tokens are longer than the context of {self.context}")
        if lengths is None:  # up to the first occurrence of the highest id; causal, so later tokens change nothing
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
