"""Building blocks of both encoders.

Parameters are fp32; activations keep the dtype they enter with (bf16 in training), so the dtype of a whole forward is
decided once, at the embedding. Normalisation and softmax compute in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.attention import Packing
from ..ranks import all_reduce_sum, world_size


def call(function: Callable, *args):
    """``function(*args)``: the default where neither torch.compile nor activation checkpointing applies."""
    return function(*args)


def _call_dynamic(function: Callable, *args):
    return function(*args)


@functools.cache
def compiled_call(*, dynamic: bool = False, cuda_graphs: bool = False) -> Callable:
    """:func:`call` under torch.compile without graph breaks; with `cuda_graphs`, replayed from CUDA graphs.

    The function is an argument, so that all blocks of one shape share one graph: their weights are inputs of the graph.
    Functions, shapes and stochastic depth combine to more graphs than torch.compile's default limit per function.

    Args:
        dynamic: False: one graph per shape, for images, whose few shapes repeat in every step. True: one graph for any
            number of rows, for packed captions, whose number of rows differs from batch to batch.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Two functions: Dynamo remembers shapes by function, and would mix the shapes of images and captions.
    function = _call_dynamic if dynamic else call
    mode = "reduce-overhead" if cuda_graphs else None
    return torch.compile(function, fullgraph=True, dynamic=dynamic, mode=mode)


class Linear(nn.Linear):
    """Linear layer whose fp32 weights follow the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches to tokens, ``[B, N, C] <- [B, 3, H, W]``; fp32 weights follow the dtype of the images.
    Raises a ValueError where H or W is not a multiple of the patch size."""

    def __init__(self, width: int, patch_size: int):
        super().__init__(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % self.stride[0] or images.shape[3] % self.stride[1]:
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels do not split into patches of {self.stride}")
        assert self.bias is not None
        x = F.conv2d(images, self.weight.to(images.dtype), self.bias.to(images.dtype), self.stride)
        return x.flatten(2).mT


class LearnedTokens(nn.Module):
    """A learned tensor ``[1, N, C]``, in a module because ZeRO-3 gathers parameters around module calls."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, count, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, dtype: torch.dtype) -> Tensor:
        # A copy: ZeRO-3 frees the gathered parameter when this call ends.
        return self.weight.to(dtype, copy=True)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in fp32, returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype and not torch.is_grad_enabled():
            return super().forward(x)  # in fp32 too, except for the weights' gradients on a CPU, not needed here
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU, used by the text encoder."""
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int | None = None, activation: Callable = F.gelu):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width if out is None else out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TokenMixer(Mlp):
    """An MLP across tokens: ``[B, out, C] <- [B, width, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, H, D] each
        return self.out(ops.attention(q, k, v, causal=self.causal, lengths=packing).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(ops.attention(q, k, v).flatten(2))


def drop_path(x: Tensor, keep: Tensor | None) -> Tensor:
    """Stochastic depth: scale each image's residual by `keep` ``[B]`` (0, or 1 / its probability)."""
    return x if keep is None else x * keep.to(x.dtype)[:, None, None]


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, activation: Callable = F.gelu):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, activation=activation)

    def forward(
        self, x: Tensor, keep: tuple[Tensor | None, Tensor | None] = (None, None), packing: Packing | None = None
    ) -> Tensor:
        """``[B, N, C]``, or the packed rows ``[1, S, C]`` of sequences that `packing` lays out; `keep`: see
        :func:`drop_path`."""
        x = x + drop_path(self.attention(self.norm1(x), packing), keep[0])
        return x + drop_path(self.mlp(self.norm2(x)), keep[1])


class PreAssign(nn.Module):
    """Group tokens look at the patches before the patches are assigned to them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = CrossAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.norm_out = LayerNorm(width)

    def forward(self, groups: Tensor, patches: Tensor) -> Tensor:
        groups = groups + self.attention(groups, patches)
        groups = groups + self.mlp(self.norm2(groups))
        return self.norm_out(groups)


class GroupingBlock(nn.Module):
    """Merges patches into segments (GroupViT, CVPR 2022, section 3.2)."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.norm_groups = LayerNorm(width)
        self.mix_groups = TokenMixer(groups, width // 2, groups)
        self.norm_mixed = LayerNorm(width)
        self.norm_patches = LayerNorm(width)
        self.pre_assign = PreAssign(width, heads)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.out = Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def prepare(self, patches: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The group tokens ``[B, G, C]`` that will collect the patches ``[B, N, C]``, and q ``[B, G, C]``, k and v
        ``[B, N, C]`` of the grouping attention."""
        patches = self.norm_patches(patches)
        groups = self.norm_mixed(self.mix_groups(self.norm_groups(groups)))
        groups = self.pre_assign(groups, patches)
        return groups, self.q(groups), *self.kv(patches).chunk(2, dim=-1)

    def finish(self, groups: Tensor, collected: Tensor) -> Tensor:
        """Segments ``[B, G, C]`` from the group tokens and the output of the grouping attention."""
        segments = groups + self.out(collected)
        return segments + self.mlp(self.norm2(segments))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the rows of all ranks, in fp32, differentiable, on any device.

    Statistics come from the first `statistics_rows` rows of each rank (equally many on all); the other rows are
    normalised with these statistics and do not enter the running averages.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, statistics_rows: int | None = None) -> Tensor:
        """``[R, C]`` in any floating dtype, returned in it."""
        values = x.float()
        if self.training:
            mean, var = self._statistics(values[:statistics_rows])
        else:
            mean, var = self.running_mean.float(), self.running_var.float()
        scale = self.weight.float() * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias.float(), values - mean, scale).to(x.dtype)

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        count = rows.shape[0] * world_size()
        mean = all_reduce_sum(rows.sum(0)) / count
        var = all_reduce_sum((rows - mean).square().sum(0)) / count
        with torch.no_grad():
            unbiased = var * (count / max(count - 1, 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return mean, var


class Projection(nn.Module):
    """Two-layer projection into the joint embedding: Linear, BatchNorm, ReLU, Linear."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.norm = BatchNorm(hidden)
        self.fc2 = Linear(hidden, out)

    def forward(
        self, x: Tensor, statistics_rows: int | None = None, *, normalise: bool = True, run: Callable = call
    ) -> Tensor:
        """fp32 embeddings ``[R, D]`` of ``[R, C]``, L2-normalised.

        Args:
            statistics_rows: see :class:`BatchNorm`.
            normalise: False: without the L2 normalisation.
            run: calls a function with its arguments (:func:`call`, :func:`compiled_call`).
        """
        return run(self._embed, x, statistics_rows, normalise)

    def _embed(self, x: Tensor, statistics_rows: int | None, normalise: bool) -> Tensor:
        embeddings = self.fc2(F.relu(self.norm(self.fc1(x), statistics_rows))).float()
        return F.normalize(embeddings, dim=-1) if normalise else embeddings
