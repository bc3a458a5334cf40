"""With this folder on PYTHONPATH, torch's CPU build claims to be another machine's: DISGUISE is a JSON object.

``cuda``: the CUDA version that it is built for; ``gpus``: how many it can use. It answers what set-up scripts and
the choice of a device ask; nothing can be computed there.
"""

import importlib.util
import json
import os
import sys
from types import ModuleType


class Disguise:
    """An import hook that acts once, at ``import torch``."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            disguise(module, **json.loads(os.environ.get("DISGUISE", "{}")))

        spec.loader.exec_module = exec_module
        return spec


def disguise(torch: ModuleType, cuda: str = "13.0", gpus: int = 1) -> None:
    torch.version.cuda = cuda
    torch.cuda.is_available = lambda: gpus > 0
    torch.cuda.device_count = lambda: gpus
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    torch.cuda.nccl.version = lambda: (2, 29, 7)


sys.meta_path.insert(0, Disguise())
