"""Cross-image patch mixing, its inverse and the progressive blend (MixReorg, ICCV 2023, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Impl, choose
from .philox import philox


@dataclass(frozen=True)
class MixPlan:
    """Which image each patch of a mixed image comes from: at every position a permutation of the group's images.

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
    ) -> MixPlan:
        """Draw a plan on `device`, without synchronising with the host.

        With `seed` (int or 0-d int64 tensor) the plan is a pure function of (seed, first_group + group, position), so
        that any number of ranks draws the same; otherwise the seed is drawn from `generator`.

        Raises:
            ValueError: `group_size` does not divide `batch`, or is below 1.
        """
        if group_size < 1 or batch % group_size:
            raise ValueError(f"a batch of {batch} images does not split into mixing groups of {group_size}")
        if device is None:
            device = generator.device if generator is not None else "cpu"
        if seed is None:
            seed = torch.randint(2**62, (), generator=generator, device=device)
        groups = batch // group_size
        group = first_group + torch.arange(groups, device=device)[:, None, None]
        position = torch.arange(patches, device=device)
        call = torch.arange((group_size + 3) // 4, device=device)[:, None]
        # One Philox call gives the sort keys of four images: [groups, 4 * calls, N]
        keys = torch.stack(philox(seed, position, call, group & 0xFFFFFFFF, group >> 32), dim=2).flatten(1, 2)
        order = keys[:, :group_size].argsort(dim=1, stable=True)
        offset = torch.arange(groups, device=device)[:, None, None] * group_size
        source = (order + offset).flatten(0, 1).int()
        inverse = (order.argsort(dim=1) + offset).flatten(0, 1).int()
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
        if group_size < 1 or batch % group_size:
            raise ValueError(f"a batch of {batch} images does not split into mixing groups of {group_size}")
        offset = torch.arange(0, batch, group_size, device=source.device)[:, None, None]
        order = source.long().view(-1, group_size, patches) - offset
        within = torch.arange(group_size, device=source.device)[:, None]
        if not bool((order.sort(dim=1).values == within).all()):
            raise ValueError("source is no bijection within its mixing groups")
        inverse = (order.argsort(dim=1) + offset).flatten(0, 1).int()
        return cls(source.int().contiguous(), inverse, group_size)

    def to(self, device: torch.device | str) -> MixPlan:
        return MixPlan(self.source.to(device), self.inverse.to(device), self.group_size)


def patch_mix_reference(x: Tensor, source: Tensor) -> Tensor:
    """``out[b, n] = x[source[b, n], n]`` for ``x [B, N, C]``."""
    return x[source.long(), torch.arange(x.shape[1], device=x.device)]


def patch_mix(x: Tensor, plan: MixPlan, *, impl: Impl = "auto") -> Tensor:
    """Mix the patches of each group of images: ``out[b, n] = x[plan.source[b, n], n]``.

    Args:
        x: ``[B, N, C]``, fp32, bf16 or fp16, any strides.
        plan: for B images of N patches.
    Returns:
        ``[B, N, C]``, the dtype of `x`. Deterministic; the gradient is a gather by the inverse plan.
    """
    _check("patch_mix", x, plan)
    choose("patch_mix", impl, {"torch": list})
    return _Gather.apply(x, plan.source, plan.inverse)


def patch_restore(x: Tensor, plan: MixPlan, *, impl: Impl = "auto") -> Tensor:
    """Put mixed patches back: the exact inverse of :func:`patch_mix`, same arguments."""
    _check("patch_restore", x, plan)
    choose("patch_restore", impl, {"torch": list})
    return _Gather.apply(x, plan.inverse, plan.source)


def patch_blend(mixed: Tensor, original: Tensor, plan: MixPlan, alpha: float, *, impl: Impl = "auto") -> Tensor:
    """Progressive mixing: ``(1 - alpha) * mixed + alpha * patch_mix(original, plan)``.

    Args:
        mixed, original: ``[B, N, C]`` of one dtype, any strides.
        alpha: share of the original features, 0 to 1.
    Returns:
        ``[B, N, C]``; differentiable in both tensors.
    """
    _check("patch_blend", mixed, plan)
    _check("patch_blend", original, plan)
    choose("patch_blend", impl, {"torch": list})
    return torch.lerp(mixed, _Gather.apply(original, plan.source, plan.inverse), alpha)


class _Gather(torch.autograd.Function):
    """A permutation's gradient is a gather by its inverse: no scatter, no atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(source, inverse)
        return patch_mix_reference(x, source)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        source, inverse = ctx.saved_tensors
        return _Gather.apply(grad, inverse, source), None, None


def _check(op: str, x: Tensor, plan: MixPlan) -> None:
    if x.dim() != 3 or x.shape[:2] != plan.source.shape:
        raise ValueError(f"{op}: x must be [B, N, C] with [B, N] = {list(plan.source.shape)}, got {list(x.shape)}")
