"""Reading ``torch.save`` files of any origin without running their code."""

from __future__ import annotations

import collections
import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import _utils

from ..errors import UserError

# All that unpickling tensors needs. Storages are named by torch's own reader, which looks them up in a table.
_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
_LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


class Placeholder:
    """Replaces every class and function of a file but those of tensors; accepts any call and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return object.__new__(cls)

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    # Every operation that a pickle applies to its objects.
    __init__ = __call__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        # A pickle can set attributes of a class or function, so it gets a wrapper, never torch's function itself.
        return functools.partial(allowed) if allowed else Placeholder


def load(file: Any, **options: Any) -> Any:
    """As ``pickle.load``; this module is torch's `pickle_module`."""
    return Unpickler(file, **options).load()


def read(path: Path) -> Any:
    """What ``torch.save`` wrote to `path`, in its zip or its older format, tensors on the CPU.

    Everything but tensors and plain containers is a :class:`Placeholder`, class or instance. No code in the file, or
    named by it, runs.

    Raises:
        UserError: the file is not of ``torch.save``, or damaged.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    if start[:4] != b"PK\x03\x04" and start != _LEGACY_START:
        raise UserError(f"{path}: not a file of torch.save")
    try:
        if start != _LEGACY_START and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            # torch.load would hand a TorchScript program to another reader, which runs parts of it.
            raise ValueError("a TorchScript program, not a file of torch.save")
        # weights_only refuses files that hold more than weights, such as NVlabs' with their configuration.
        return torch.load(path, map_location="cpu", pickle_module=sys.modules[__name__], weights_only=False)
    except Exception as error:  # damage may show as any exception
        raise UserError(f"{path}: not a readable torch file: {error}") from None
