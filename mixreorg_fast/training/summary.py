"""What a run computes with, in one line."""

from __future__ import annotations

import torch

from .. import devices
from ..config import Config
from ..ops.attention import Packing, chosen
from .distributed import World


def summary(config: Config, world: World) -> str:
    """Devices and driver, precision, compilation, attention (of images / of captions), ZeRO stage, images per step."""
    train = config.train
    images = f"{world.size} ranks × " if world.size > 1 else ""
    images += f"{train.accumulation} × " if train.accumulation > 1 else ""
    return ", ".join(
        [
            f"{world.size} × {devices.describe(world.device)}",
            train.precision + (" (TF32)" if train.tf32 and world.device.type == "cuda" else ""),
            _compilation(config, world.device),
            f"attention: {'/'.join(_attention(config, world.device))}",
            f"ZeRO-{config.deepspeed.zero_stage}",
            f"{train.batch} images a step" + (f" ({images}{config.micro_batch(world.size)})" if images else ""),
        ]
    )


def _compilation(config: Config, device: torch.device) -> str:
    if not config.compiles(device.type):
        return "not compiled"
    return "compiled, CUDA graphs" if config.train.cuda_graphs else "compiled"


def _attention(config: Config, device: torch.device) -> tuple[str, str]:
    """The implementations that images and captions take."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    image, text = (
        torch.empty(1, 8, part.heads, part.width // part.heads, dtype=dtype, device=device)
        for part in (config.model, config.model.text)
    )
    return chosen(image), chosen(text, Packing.of([8], device))
