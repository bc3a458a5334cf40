"""Cross-image patch mixing, its inverse and the progressive blend (MixReorg, ICCV 2023, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Impl, falls_back, uses_triton
from .philox import draws, seed_tensor
from .registration import kernel


@dataclass(frozen=True)
class MixPlan:
    """The source image of each patch of a mixed image: at every position a permutation of the group's images.

    ``mixed[b, n] = x[source[b, n], n]`` and ``x[b, n] = mixed[inverse[b, n], n]``; both int32 ``[B, N]``, absolute
    image indices. Groups are `group_size` consecutive images.
    """

    source: Tensor
    inverse: Tensor
    group_size: int

    @property
    def labels(self) -> Tensor:
        """Source of each patch within its group, int64 ``[B, N]`` in ``0..group_size-1``."""
        return (self.source % self.group_size).long()

    @classmethod
    def sample(
        cls,
        batch: int,
        patches: int,
        group_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        seed: int | Tensor | None = None,
        first_group: int = 0,
        impl: Impl = "auto",
    ) -> MixPlan:
        """Draw a plan on `device`, without synchronising with the host.

        With `seed` (int or 0-d int64 tensor) the plan is a pure function of (seed, first_group + group, position), the
        same for every `impl`, so that any number of ranks draws the same plan. Without it the seed is drawn from
        `generator`. `device` defaults to that of `seed` or `generator`, else the CPU.

        Raises:
            ValueError: `group_size` does not divide `batch`, or is below 1. RuntimeError: `impl` cannot run there.
        """
        _check_groups(batch, group_size)
        if device is None:
            device = next((x.device for x in (seed, generator) if isinstance(x, (Tensor, torch.Generator))), "cpu")
        if seed is None:
            seed = torch.randint(2**62, (), generator=generator, device=device)
        seed = seed_tensor(seed, device)
        draw = _sample_plan if uses_triton("MixPlan.sample", impl, seed) else sample_plan_reference
        source, inverse = draw(seed, first_group, batch, patches, group_size)
        return cls(source, inverse, group_size)

    @classmethod
    def from_source(cls, source: Tensor, group_size: int) -> MixPlan:
        """A plan from absolute source indices ``[B, N]``.

        Raises:
            ValueError: `source` is not two-dimensional, `group_size` does not divide B, or the sources of a group at
                some position are no permutation of the group's images.
        """
        if source.dim() != 2:
            raise ValueError(f"source must be [B, N], got {list(source.shape)}")
        batch, patches = source.shape
        _check_groups(batch, group_size)
        offset = torch.arange(0, batch, group_size, device=source.device)[:, None, None]
        order = source.long().view(-1, group_size, patches) - offset
        within = torch.arange(group_size, device=source.device)[:, None]
        if not bool((order.sort(dim=1).values == within).all()):
            raise ValueError("source is no bijection within its mixing groups")
        inverse = (order.argsort(dim=1) + offset).flatten(0, 1).int()
        return cls(source.int().contiguous(), inverse, group_size)

    def to(self, device: torch.device | str) -> MixPlan:
        return MixPlan(self.source.to(device), self.inverse.to(device), self.group_size)


def sample_plan_reference(
    seed: Tensor, first_group: int, batch: int, patches: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """`source` and `inverse` of a plan: at each position the group's images in the order of their random keys."""
    keys = draws(seed, first_group, batch // group_size, group_size, patches, seed.device)
    order = keys.argsort(dim=1, stable=True)  # [groups, K, N]
    offset = torch.arange(0, batch, group_size, device=seed.device)[:, None, None]
    source, inverse = ((offset + index).flatten(0, 1).int() for index in (order, order.argsort(dim=1)))
    return source, inverse


def patch_mix_reference(x: Tensor, source: Tensor, inverse: Tensor | None = None) -> Tensor:
    """``out[b, n] = x[source[b, n], n]`` for ``x [B, N, C]``; with `inverse` its gradient is a gather by that."""
    if inverse is not None:
        return _Gather.apply(x, source, inverse)
    return x[source.long(), torch.arange(x.shape[1], device=x.device)]


def patch_blend_reference(
    mixed: Tensor, original: Tensor, source: Tensor, alpha: float, inverse: Tensor | None = None
) -> Tensor:
    """``(1 - alpha) * mixed + alpha * original[source, n]``, in the dtype of `mixed`."""
    return torch.lerp(mixed, patch_mix_reference(original, source, inverse), alpha)


@falls_back
def patch_mix(x: Tensor, plan: MixPlan, *, impl: Impl = "auto") -> Tensor:
    """Mix the patches of each group of images: ``out[b, n] = x[plan.source[b, n], n]``.

    Args:
        x: ``[B, N, C]``, fp32, bf16 or fp16, any strides (read in place where the channels lie together).
        plan: for B images of N patches.
    Returns:
        ``[B, N, C]``, the dtype of `x`, under autocast too. Deterministic, as is the gradient.
    Raises:
        ValueError: a plan for other sizes. RuntimeError: `impl` cannot run here.
    """
    return _permute("patch_mix", x, plan, plan.source, plan.inverse, impl)


@falls_back
def patch_restore(x: Tensor, plan: MixPlan, *, impl: Impl = "auto") -> Tensor:
    """Put mixed patches back: ``out[b, n] = x[plan.inverse[b, n], n]``, the exact inverse of :func:`patch_mix`.

    Same arguments, same guarantees.
    """
    return _permute("patch_restore", x, plan, plan.inverse, plan.source, impl)


@falls_back
def patch_blend(mixed: Tensor, original: Tensor, plan: MixPlan, alpha: float, *, impl: Impl = "auto") -> Tensor:
    """Progressive mixing in one pass: ``(1 - alpha) * mixed + alpha * patch_mix(original, plan)``.

    Args:
        mixed, original: ``[B, N, C]`` of one dtype, any strides.
        alpha: share of the original features, 0 to 1.
    Returns:
        ``[B, N, C]``, the dtype of the inputs (blended in fp32), under autocast too. Deterministic, differentiable.
    Raises:
        ValueError: a plan for other sizes, or inputs of two dtypes. RuntimeError: `impl` cannot run here.
    """
    _check("patch_blend", mixed, plan)
    _check("patch_blend", original, plan)
    if mixed.dtype != original.dtype:
        raise ValueError(f"patch_blend: mixed is {mixed.dtype}, original {original.dtype}; expected one dtype")
    if uses_triton("patch_blend", impl, mixed, original, plan.source):
        return _patch_blend(mixed, original, plan.source, alpha)
    return patch_blend_reference(mixed, original, plan.source, alpha, plan.inverse)


def _permute(op: str, x: Tensor, plan: MixPlan, source: Tensor, inverse: Tensor, impl: Impl) -> Tensor:
    _check(op, x, plan)
    return (_patch_gather if uses_triton(op, impl, x, source) else patch_mix_reference)(x, source, inverse)


def _check_groups(batch: int, group_size: int) -> None:
    if group_size < 1 or batch % group_size:
        raise ValueError(f"a batch of {batch} images does not split into mixing groups of {group_size}")


def _check(op: str, x: Tensor, plan: MixPlan) -> None:
    if x.dim() != 3 or x.shape[:2] != plan.source.shape:
        raise ValueError(f"{op}: x must be [B, N, C] with [B, N] = {list(plan.source.shape)}, got {list(x.shape)}")


class _Gather(torch.autograd.Function):
    """PyTorch's gather, with a gather as its gradient: that of PyTorch's indexing scatters, with atomics or a sort."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(source, inverse)
        return patch_mix_reference(x, source)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        source, inverse = ctx.saved_tensors
        return _Gather.apply(grad, inverse, source), None, None


# The Triton path. Each op's adjoint is registered too, with the op as its adjoint: this gives second derivatives.


@kernel("patch_mixing.sample_plan")
def _sample_plan(seed: Tensor, first_group: int, batch: int, patches: int, group_size: int) -> tuple[Tensor, Tensor]:
    source = seed.new_empty((batch, patches), dtype=torch.int32)
    return source, seed.new_empty(source.shape, dtype=torch.int32)


def _gather_gradient(grad: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    return _patch_gather(grad, inverse, source)


@kernel("patch_mixing.gather_forward", gradient=_gather_gradient, first_kept=1)
def _patch_gather(x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _blend_gradient(grad: Tensor, source: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return _patch_blend_backward(grad, source, alpha)


@kernel("patch_mixing.blend_forward", gradient=_blend_gradient, first_kept=2)
def _patch_blend(mixed: Tensor, original: Tensor, source: Tensor, alpha: float) -> Tensor:
    return mixed.new_empty(mixed.shape)


@kernel("patch_mixing.blend_backward", gradient=_patch_blend, first_kept=1)
def _patch_blend_backward(grad: Tensor, source: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)
