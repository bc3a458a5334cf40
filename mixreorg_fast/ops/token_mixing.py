"""Mixing, restoration and blending of whole tokens, the input of a transformer block (MixReorg, ICCV 2023, section 3).

Tokens ``[B, N + G, C]`` are N patches, then G group tokens (0 where a model has none). Branches (original, mixed,
restored) lie along the batch. The ops of :mod:`.patch_mixing` move patches only: a model that calls them slices its
tokens and concatenates them again, which moves more memory than the ops do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.settings import Appending, Blending
from .dispatch import Impl, falls_back, uses_triton
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
    groups = _checked("mix_tokens", x, 1, plan, groups)
    if uses_triton("mix_tokens", impl, x, plan.source, groups):
        return _append_branch(x, groups, plan.source, Appending(plan.group_size, True, groups is None))
    return mix_tokens_reference(x, plan.source, plan.group_size, groups, _gather_with(plan.inverse))


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
    groups = _checked("restore_tokens", x, 2, plan, groups)
    if uses_triton("restore_tokens", impl, x, plan.inverse, groups):
        return _append_branch(x, groups, plan.inverse, Appending(plan.group_size, keep_mixed, groups is None))
    by_inverse = _gather_with(plan.source)
    return restore_tokens_reference(x, plan.inverse, plan.group_size, groups, keep_mixed, by_inverse)


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
    _checked("blend_tokens", x, 2, plan)
    if uses_triton("blend_tokens", impl, x, plan.source):
        return _blend_tokens(x, plan.source, Blending(plan.group_size, alpha))
    return blend_tokens_reference(x, plan.source, alpha, _gather_with(plan.inverse))


def _checked(op: str, x: Tensor, branches: int, plan: MixPlan, groups: Tensor | None = None) -> Tensor | None:
    """`groups` of all images, once everything fits."""
    batch, patches = plan.source.shape
    if x.dim() != 3 or x.shape[0] != branches * batch or x.shape[1] < patches:
        expected = f"[{branches * batch}, {patches} + G, C]"
        raise ValueError(f"{op}: x must be {expected} for a plan {[batch, patches]}, got {list(x.shape)}")
    if groups is None:
        return None
    shape = (batch, x.shape[1] - patches, x.shape[2])
    if groups.dim() != 3 or groups.shape[0] not in (1, batch) or groups.shape[1:] != shape[1:]:
        raise ValueError(f"{op}: groups must be {list(shape)} or [1, …], got {list(groups.shape)}")
    if groups.dtype != x.dtype:
        raise ValueError(f"{op}: groups are {groups.dtype}, x is {x.dtype}; expected one dtype")
    return groups.expand(shape)


def _gather_with(inverse: Tensor) -> Gather:
    """A gather of patches whose gradient is a gather by `inverse`."""
    return lambda x, source: gather(x, source, inverse)


# The Triton path. The adjoint of an op's adjoint is the op: this gives second derivatives.


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *_, source, ctx.settings = inputs
    ctx.save_for_backward(source)


def _append_gradient(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    (source,) = ctx.saved_tensors
    batch, patches = source.shape
    grad_x = _append_branch_backward(grad, source, ctx.settings)
    return grad_x, None if ctx.settings.mean else grad[-batch:, patches:]


@kernel("token_mixing.append_branch_forward", save=_save, gradient=_append_gradient)
def _append_branch(x: Tensor, groups: Tensor | None, source: Tensor, settings: Appending) -> Tensor:
    return x.new_empty((x.shape[0] + source.shape[0] * settings.keep, *x.shape[1:]))


def _append_backward_gradient(ctx, grad: Tensor) -> Tensor:
    (source,) = ctx.saved_tensors
    groups = None if ctx.settings.mean else torch.zeros_like(grad[-source.shape[0] :, source.shape[1] :])
    return _append_branch(grad, groups, source, ctx.settings)


@kernel("token_mixing.append_branch_backward", save=_save, gradient=_append_backward_gradient)
def _append_branch_backward(grad: Tensor, source: Tensor, settings: Appending) -> Tensor:
    return grad.new_empty((grad.shape[0] - source.shape[0] * settings.keep, *grad.shape[1:]))


def _blend_gradient(ctx, grad: Tensor) -> Tensor:
    group_size, alpha, adjoint = ctx.settings
    return _blend_tokens(grad, *ctx.saved_tensors, Blending(group_size, alpha, not adjoint))


@kernel("token_mixing.blend_tokens", save=_save, gradient=_blend_gradient)
def _blend_tokens(x: Tensor, source: Tensor, settings: Blending) -> Tensor:
    return x.new_empty(x.shape)
