"""Mixing, restoration and blending of whole tokens, the input of a transformer block (MixReorg, ICCV 2023, section 3).

Tokens ``[B, N + G, C]`` are N patches, then G group tokens (0 where a model has none). Branches (original, mixed,
restored) lie along the batch. The ops of :mod:`.patch_mixing` move patches only: a model that calls them slices its
tokens and concatenates them again, which moves more memory than the ops do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.settings import Appending, Blending
from .dispatch import Impl, falls_back, uses_triton
from .patch_mixing import MixPlan, patch_blend_reference, patch_mix_reference
from .registration import kernel

# The gradient of a gather by `source` is a gather by `inverse`, and vice versa; the references use it if given both.


def mix_tokens_reference(
    x: Tensor, source: Tensor, group_size: int, groups: Tensor | None = None, inverse: Tensor | None = None
) -> Tensor:
    """``[x | mixed]`` along the batch, see :func:`mix_tokens`."""
    return torch.cat([x, _branch_reference(x, source, group_size, groups, inverse)])


def restore_tokens_reference(
    x: Tensor,
    inverse: Tensor,
    group_size: int,
    groups: Tensor | None = None,
    keep_mixed: bool = True,
    source: Tensor | None = None,
) -> Tensor:
    """``[original | mixed | restored]`` or ``[original | restored]`` along the batch, see :func:`restore_tokens`."""
    original, mixed = x.chunk(2)
    restored = _branch_reference(mixed, inverse, group_size, groups, source)
    return torch.cat([x if keep_mixed else original, restored])


def blend_tokens_reference(x: Tensor, source: Tensor, alpha: float, inverse: Tensor | None = None) -> Tensor:
    """``[original | blended]`` along the batch, see :func:`blend_tokens`."""
    original, mixed = x.chunk(2)
    patches = source.shape[1]
    blended = patch_blend_reference(mixed[:, :patches], original[:, :patches], source, alpha, inverse)
    return torch.cat([original, torch.cat([blended, mixed[:, patches:]], dim=1)])


def _branch_reference(
    x: Tensor, source: Tensor, group_size: int, groups: Tensor | None, inverse: Tensor | None
) -> Tensor:
    patches, own = x[:, : source.shape[1]], x[:, source.shape[1] :]
    if groups is None:
        by_group = own.unflatten(0, (-1, group_size))  # [B / K, K, G, C]
        groups = by_group.float().mean(1, keepdim=True).to(own.dtype).expand_as(by_group).flatten(0, 1)
    return torch.cat([patch_mix_reference(patches, source, inverse), groups.expand_as(own)], dim=1)


@falls_back
def mix_tokens(x: Tensor, plan: MixPlan, groups: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Tokens with their mixed branch behind them: patches as :func:`.patch_mix` mixes them, new group tokens.

    Args:
        x: ``[B, N + G, C]``, fp32, bf16 or fp16, any strides (read in place where the channels lie together).
        plan: for B images of N patches.
        groups: group tokens of the mixed branch, ``[1, G, C]`` or ``[B, G, C]`` in the dtype of `x`. None: each mixing
            group's mean of those in `x`.
    Returns:
        ``[2B, N + G, C]``, `x` first; the dtype of `x`, under autocast too. Deterministic, differentiable.
    Raises:
        ValueError: sizes that do not fit the plan, or `groups` of another dtype. RuntimeError: `impl` cannot run here.
    """
    groups = _checked("mix_tokens", x, 1, plan, groups)
    if uses_triton("mix_tokens", impl, x, plan.source, groups):
        return _append_branch(x, groups, plan.source, Appending(plan.group_size, True, groups is None))
    return mix_tokens_reference(x, plan.source, plan.group_size, groups, plan.inverse)


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
    return restore_tokens_reference(x, plan.inverse, plan.group_size, groups, keep_mixed, plan.source)


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
    return blend_tokens_reference(x, plan.source, alpha, plan.inverse)


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


# The Triton path. The adjoint of an op's adjoint is the op: this gives second derivatives.


def _append_gradient(grad: Tensor, source: Tensor, settings: Appending) -> tuple[Tensor, Tensor | None]:
    grad_x = _append_branch_backward(grad, source, settings)
    return grad_x, None if settings.mean else grad[-source.shape[0] :, source.shape[1] :]


@kernel("token_mixing.append_branch_forward", gradient=_append_gradient, first_kept=2)
def _append_branch(x: Tensor, groups: Tensor | None, source: Tensor, settings: Appending) -> Tensor:
    kept = source.shape[0] if settings.keep else 0  # PyTorch 2.11 multiplies no symbolic size by a bool
    return x.new_empty((x.shape[0] + kept, *x.shape[1:]))


def _append_backward_gradient(grad: Tensor, source: Tensor, settings: Appending) -> Tensor:
    groups = None if settings.mean else torch.zeros_like(grad[-source.shape[0] :, source.shape[1] :])
    return _append_branch(grad, groups, source, settings)


@kernel("token_mixing.append_branch_backward", gradient=_append_backward_gradient, first_kept=1)
def _append_branch_backward(grad: Tensor, source: Tensor, settings: Appending) -> Tensor:
    kept = source.shape[0] if settings.keep else 0
    return grad.new_empty((grad.shape[0] - kept, *grad.shape[1:]))


def _blend_gradient(grad: Tensor, source: Tensor, settings: Blending) -> Tensor:
    group_size, alpha, adjoint = settings
    return _blend_tokens(grad, source, Blending(group_size, alpha, not adjoint))


@kernel("token_mixing.blend_tokens", gradient=_blend_gradient, first_kept=1)
def _blend_tokens(x: Tensor, source: Tensor, settings: Blending) -> Tensor:
    return x.new_empty(x.shape)
