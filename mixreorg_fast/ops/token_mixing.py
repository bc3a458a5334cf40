"""Mixing, restoration and blending of whole tokens, the input of a transformer block (MixReorg, ICCV 2023, section 3).

Tokens ``[B, N + G, C]`` are N patches, then G group tokens (0 where a model has none). Branches (original, mixed,
restored) lie along the batch. The ops of :mod:`.mixing` move patches alone; around them a model slices its tokens and
puts them together again, which moves more memory than the ops themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import Impl, choose, falls_back, triton_reasons
from .patch_mixing import MixPlan, gather, patch_mix_reference
from .registration import kernel

Gather = Callable[[Tensor, Tensor], Tensor]  # of patches [B, N, C] by source images [B, N]


def mix_tokens_reference(
    x: Tensor, source: Tensor, group_size: int, groups: Tensor | None = None, gather: Gather = patch_mix_reference
) -> Tensor:
    """``[x | mixed]`` along the batch, see :func:`mix_tokens`."""
    return torch.cat([x, _branch_reference(x, source, group_size, groups, gather)])


def restore_tokens_reference(
    x: Tensor,
    inverse: Tensor,
    group_size: int,
    groups: Tensor | None = None,
    keep_mixed: bool = True,
    gather: Gather = patch_mix_reference,
) -> Tensor:
    """``[original | mixed | restored]`` or ``[original | restored]`` along the batch, see :func:`restore_tokens`."""
    original, mixed = x.chunk(2)
    restored = _branch_reference(mixed, inverse, group_size, groups, gather)
    return torch.cat([x if keep_mixed else original, restored])


def blend_tokens_reference(x: Tensor, source: Tensor, alpha: float, gather: Gather = patch_mix_reference) -> Tensor:
    """``[original | blended]`` along the batch, see :func:`blend_tokens`."""
    original, mixed = x.chunk(2)
    patches = source.shape[1]
    blended = torch.lerp(mixed[:, :patches], gather(original[:, :patches], source), alpha)
    return torch.cat([original, torch.cat([blended, mixed[:, patches:]], dim=1)])


def _branch_reference(x: Tensor, source: Tensor, group_size: int, groups: Tensor | None, gather: Gather) -> Tensor:
    patches, own = x[:, : source.shape[1]], x[:, source.shape[1] :]
    if groups is None:
        by_group = own.unflatten(0, (-1, group_size))  # [B / K, K, G, C]
        groups = by_group.float().mean(1, keepdim=True).to(own.dtype).expand_as(by_group).flatten(0, 1)
    return torch.cat([gather(patches, source), groups.expand_as(own)], dim=1)


@falls_back
def mix_tokens(x: Tensor, plan: MixPlan, groups: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Tokens with their mixed branch behind them: patches as :func:`.patch_mix` mixes them, new group tokens.

    Args:
        x: ``[B, N + G, C]``, fp32, bf16 or fp16, any strides (read in place where the channels lie together).
        plan: for B images of N patches.
        groups: group tokens of the mixed branch, ``[1, G, C]`` or ``[B, G, C]`` in the dtype of `x`. None: each mixing
            group's mean of those in `x`.
    Returns:
        ``[2B, N + G, C]``, `x` first; the dtype of `x`, under autocast too. Deterministic, differentiable in `x` and
        `groups`.
    Raises:
        ValueError: sizes that do not fit the plan, or `groups` of another dtype. RuntimeError: `impl` cannot run here.
    """
    return _append("mix_tokens", x, 1, plan.source, plan.inverse, plan.group_size, groups, True, impl)


@falls_back
def restore_tokens(
    x: Tensor, plan: MixPlan, groups: Tensor | None = None, *, keep_mixed: bool = True, impl: Impl = "auto"
) -> Tensor:
    """Tokens of the original and the mixed branch with the restored one behind them: the mixed patches in their own
    places again, as :func:`.patch_restore` puts them, and new group tokens.

    Args:
        x: ``[2B, N + G, C]``, original before mixed; otherwise as in :func:`mix_tokens`.
        plan: that the patches were mixed by.
        groups: as in :func:`mix_tokens`. None: each mixing group's mean of those of the mixed branch.
        keep_mixed: False leaves the mixed branch out of what is returned.
    Returns:
        ``[3B, N + G, C]``, without the mixed branch ``[2B, N + G, C]``; same guarantees.
    """
    return _append("restore_tokens", x, 2, plan.inverse, plan.source, plan.group_size, groups, keep_mixed, impl)


@falls_back
def blend_tokens(x: Tensor, plan: MixPlan, alpha: float, *, impl: Impl = "auto") -> Tensor:
    """Progressive mixing: in the mixed branch ``patches = (1 - alpha) * patches + alpha * patch_mix(original)``.

    Args:
        x: ``[2B, N + G, C]``, original before mixed; fp32, bf16 or fp16, any strides.
        plan: that the patches were mixed by.
        alpha: share of the original features, 0 to 1.
    Returns:
        A new tensor of the shape and dtype of `x` (blended in fp32), under autocast too. The original branch and all
        group tokens are unchanged. Deterministic, differentiable in `x`.
    Raises:
        ValueError: a plan for other sizes. RuntimeError: `impl` cannot run here.
    """
    _check("blend_tokens", x, 2, plan.source)
    inputs = (x, plan.source)
    if choose("blend_tokens", impl, {"triton": lambda: triton_reasons(*inputs), "torch": list}, inputs) == "triton":
        return _blend_tokens(x, plan.source, alpha, plan.group_size, False)
    return blend_tokens_reference(x, plan.source, alpha, lambda x, source: gather(x, source, plan.inverse))


def _append(
    op: str,
    x: Tensor,
    branches: int,
    source: Tensor,
    inverse: Tensor,
    group_size: int,
    groups: Tensor | None,
    keep: bool,
    impl: Impl,
) -> Tensor:
    _check(op, x, branches, source)
    if groups is not None:
        shape = (len(source), x.shape[1] - source.shape[1], x.shape[2])
        if groups.dim() != 3 or groups.shape[0] not in (1, shape[0]) or groups.shape[1:] != shape[1:]:
            raise ValueError(f"{op}: groups must be {list(shape)} or [1, …], got {list(groups.shape)}")
        if groups.dtype != x.dtype:
            raise ValueError(f"{op}: groups are {groups.dtype}, x is {x.dtype}; expected one dtype")
        groups = groups.expand(shape)
    inputs = (x, source) if groups is None else (x, source, groups)
    if choose(op, impl, {"triton": lambda: triton_reasons(*inputs), "torch": list}, inputs) == "triton":
        return _append_branch(x, groups, source, group_size, keep)
    by_index = lambda x, source: gather(x, source, inverse)  # noqa: E731
    if branches == 1:
        return mix_tokens_reference(x, source, group_size, groups, by_index)
    return restore_tokens_reference(x, source, group_size, groups, keep, by_index)


def _check(op: str, x: Tensor, branches: int, source: Tensor) -> None:
    batch, patches = source.shape
    if x.dim() != 3 or x.shape[0] != branches * batch or x.shape[1] < patches:
        expected = f"[{branches * batch}, {patches} + G, C]"
        raise ValueError(f"{op}: x must be {expected} for a plan {list(source.shape)}, got {list(x.shape)}")


# The Triton path. The adjoint of an op's adjoint is the op: this gives second derivatives.


def _fake_append(x: Tensor, groups: Tensor | None, source: Tensor, group_size: int, keep: bool) -> Tensor:
    return x.new_empty((x.shape[0] + source.shape[0] * keep, *x.shape[1:]))


def _save_append(ctx, inputs: tuple, output: Tensor) -> None:
    _, groups, source, ctx.group_size, ctx.keep = inputs
    ctx.mean = groups is None
    ctx.save_for_backward(source)


def _append_gradient(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    (source,) = ctx.saved_tensors
    batch, patches = source.shape
    grad_x = _append_branch_backward(grad, source, ctx.group_size, ctx.keep, ctx.mean)
    return grad_x, None if ctx.mean else grad[-batch:, patches:], None, None, None


@kernel("append_branch", fake=_fake_append, save=_save_append, gradient=_append_gradient)
def _append_branch(x: Tensor, groups: Tensor | None, source: Tensor, group_size: int, keep: bool) -> Tensor:
    from ..kernels.token_mixing import append_branch_forward

    return append_branch_forward(x, groups, source, group_size, keep)


def _fake_append_backward(grad: Tensor, source: Tensor, group_size: int, keep: bool, mean: bool) -> Tensor:
    return grad.new_empty((grad.shape[0] - source.shape[0] * keep, *grad.shape[1:]))


def _save_append_backward(ctx, inputs: tuple, output: Tensor) -> None:
    _, source, ctx.group_size, ctx.keep, ctx.mean = inputs
    ctx.save_for_backward(source)


def _append_backward_gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (source,) = ctx.saved_tensors
    groups = None if ctx.mean else torch.zeros_like(grad[-len(source) :, source.shape[1] :])
    return _append_branch(grad, groups, source, ctx.group_size, ctx.keep), None, None, None, None


@kernel(
    "append_branch_backward", fake=_fake_append_backward, save=_save_append_backward, gradient=_append_backward_gradient
)
def _append_branch_backward(grad: Tensor, source: Tensor, group_size: int, keep: bool, mean: bool) -> Tensor:
    from ..kernels.token_mixing import append_branch_backward

    return append_branch_backward(grad, source, group_size, keep, mean)


def _save_blend(ctx, inputs: tuple, output: Tensor) -> None:
    _, source, ctx.alpha, ctx.group_size, ctx.adjoint = inputs
    ctx.save_for_backward(source)


def _blend_gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _blend_tokens(grad, *ctx.saved_tensors, ctx.alpha, ctx.group_size, not ctx.adjoint), None, None, None, None


@kernel(
    "blend_tokens",
    fake=lambda x, source, alpha, group_size, adjoint: x.new_empty(x.shape),
    save=_save_blend,
    gradient=_blend_gradient,
)
def _blend_tokens(x: Tensor, source: Tensor, alpha: float, group_size: int, adjoint: bool) -> Tensor:
    from ..kernels.token_mixing import blend_tokens

    return blend_tokens(x, source, alpha, group_size, adjoint)
