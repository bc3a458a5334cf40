"""mixreorg_fast: MixReorg (ICCV 2023) pre-training for open-vocabulary segmentation, on fused kernels.

``from mixreorg_fast import ops`` for the fast ops, ``mixreorg_fast.load(DIR).segment(image, classes)`` for weights.
Importing this package imports no third-party package and queries no device; its parts are imported when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from . import ops
    from .inference.model import load
    from .models.accelerate import accelerate

__version__ = "0.1.0"
__all__ = ["UserError", "accelerate", "load", "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name == "load":
        return importlib.import_module(".inference.model", __name__).load
    if name == "accelerate":
        return importlib.import_module(".models.accelerate", __name__).accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
