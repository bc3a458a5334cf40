"""What would make the host wait for a GPU, recorded on the CPU.

A tensor counts as the GPU's if it was made with an explicit device, copied there, or computed from such a tensor; all
others are the host's. The host waits where it reads a GPU's tensor (``item``, ``tolist``, ``bool``, shapes that
depend on values) and where it copies to the GPU from memory that is not pinned, or without ``non_blocking``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOMS = ("mixreorg_fast", "deepspeed", "kernels")
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten.unique_dim.default,
}
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
FACTORIES = (
    torch.arange,
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.eye,
    torch.full,
    torch.full_like,
    torch.linspace,
    torch.ones,
    torch.ones_like,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.zeros,
    torch.zeros_like,
)
COPYING = (torch.tensor, torch.as_tensor)


class Synchronisations:
    """Calls `record` with the place ``room/file.py:function`` of whatever would wait."""

    def __init__(self, record: Callable[[str], None]) -> None:
        self._record = record
        self._gpu: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for (owner, name), replacement in _patched(self).items():
                stack.enter_context(mock.patch.object(owner, name, replacement))
            stack.enter_context(_Dispatch(self))
            yield

    def to_gpu(self, *tensors: Tensor | None) -> None:
        """Take these tensors for the GPU's."""
        for tensor in tensors:
            if tensor is not None:
                storage = StorageWeakRef(tensor.untyped_storage())
                self._gpu[storage.cdata] = storage

    def on_gpu(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._gpu

    def pinning(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        storage = StorageWeakRef(pinned.untyped_storage())
        self._pinned[storage.cdata] = storage
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def waits(self) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            parts = frame.f_code.co_filename.split("/")
            room = next((room for room in ROOMS if room in parts[:-1]), None)
            if room is not None:
                path = "/".join(parts[len(parts) - 1 - parts[::-1].index(room) :])
                return self._record(f"{path}:{frame.f_code.co_name}")
            frame = frame.f_back
        return self._record("elsewhere")


def _patched(owner: Synchronisations) -> dict[tuple[Any, str], Callable]:
    """Replacements of functions that PyTorch's dispatcher cannot tell apart on a CPU: copies to where a tensor already
    is, pinning, explicit devices. A TorchFunctionMode would see them too, but not in backward."""

    def made(function: Callable) -> Callable:
        def replacement(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            if kwargs.get("device") is not None:
                if function in COPYING:
                    owner.waits()
                owner.to_gpu(out)
            return out

        return replacement

    def read(function: Callable) -> Callable:
        def replacement(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if owner.on_gpu(self):
                owner.waits()
            return function(self, *args, **kwargs)

        return replacement

    to, one_hot = Tensor.to, F.one_hot

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = to(self, *args, **kwargs)
        targets = (*args, kwargs.get("device"), kwargs.get("other"))
        if owner.on_gpu(self) or not any(isinstance(target, torch.device | str | Tensor) for target in targets):
            return out
        if not (owner.is_pinned(self) and kwargs.get("non_blocking")):
            owner.waits()
        out = out.clone()
        owner.to_gpu(out)
        return out

    def one_hot_as_on_gpu(index: Tensor, classes: int) -> Tensor:
        """A CPU reads the values to check them; on a GPU the kernel checks."""
        with _disable_current_modes():
            out = one_hot(index, classes)
        if owner.on_gpu(index):
            owner.to_gpu(out)
        return out

    return {
        **{(torch, function.__name__): made(function) for function in (*FACTORIES, *COPYING)},
        **{(Tensor, name): read(getattr(Tensor, name)) for name in ("tolist", "numpy", "cpu", "new_tensor")},
        (Tensor, "to"): moved,
        (Tensor, "pin_memory"): lambda self: owner.pinning(self),
        (F, "one_hot"): one_hot_as_on_gpu,
    }


class _Dispatch(TorchDispatchMode):
    def __init__(self, owner: Synchronisations) -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        owner, kwargs = self._owner, kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        gpu = any(owner.on_gpu(leaf) for leaf in leaves)
        if gpu and (func in READS or (func in INDEXING and any(_is_mask(index) for index in args[1]))):
            owner.waits()
        if gpu and func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            owner.waits()
        if func is torch.ops.aten.copy_.default and owner.on_gpu(args[0]) != owner.on_gpu(args[1]):
            host = args[1] if owner.on_gpu(args[0]) else args[0]
            if not (owner.is_pinned(host) and (kwargs.get("non_blocking") or args[2:] == (True,))):
                owner.waits()
        out = func(*args, **kwargs)
        if gpu:
            owner.to_gpu(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
