"""The lines that a run prints at its beginning and at its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import devices
from ..config import Config
from ..ops.attention import Packing, chosen
from ..ranks import Ranks

SCENES = "the embedded scenes"
WAYS = ("image_to_text", "text_to_image")
PICTURES = ("segmentation.png", "segments.png", "mixing.png", "losses.png")


def summary(config: Config, ranks: Ranks) -> str:
    """Devices and driver, precision, compilation, attention (of images / of captions), ZeRO stage, images per step."""
    train = config.train
    compilation = "compiled, CUDA graphs" if config.replays(ranks.device.type) else "compiled"
    images = f"{ranks.size} ranks × " if ranks.size > 1 else ""
    images += f"{train.accumulation} × " if train.accumulation > 1 else ""
    parts = [
        f"{ranks.size} × {devices.describe(ranks.device)}",
        train.precision + (" (TF32)" if train.tf32 and ranks.device.type == "cuda" else ""),
        compilation if config.compiles(ranks.device.type) else "not compiled",
        f"attention: {'/'.join(_attention(config, ranks.device))}",
        f"ZeRO-{config.deepspeed.zero_stage}",
        f"{train.batch} images a step" + (f" ({images}{config.micro_batch(ranks.size)})" if images else ""),
    ]
    return ", ".join(parts)


def opening(config: Config, samples: int, module: nn.Module, steps: int) -> str:
    """Data, model, steps and folder; `module`: before DeepSpeed partitions its parameters."""
    data = f"{SCENES} ({config.data.scenes.folder})" if config.data.is_scenes else "data.shards"
    method = {"mixreorg": "MixReorg", "groupvit": "GroupViT"}[config.model.method]
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return (
        f"{samples:,} samples of {data}, {method} of {millions:.1f} million parameters, {steps:,} steps, "
        f"in {config.run_folder}"
    )


def expected(seconds: float, steps: int) -> str:
    """The remaining time, at the speed of the first steps."""
    time = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} seconds"
    return f"about {time} for the remaining {steps:,} steps, then the scores"


def closing(scores: dict[str, Any], config: Config) -> str:
    """The scores with their meaning, the pictures, and the next command."""
    run, lines = config.run_folder, []
    for name, value in scores.items():
        if "mIoU" in value:
            background = value.get("all_background_mIoU")
            parts = [f"all background scores {background:.2f}"] if background is not None else []
            parts.append(f"oracle {value['oracle_mIoU']:.2f}")
            lines.append(f"{name}: mIoU {value['mIoU']:.2f} % ({', '.join(parts)})")
    if lines:
        lines.append("oracle: the mIoU if every segment had its best class, so how well segments fit objects")
    if "retrieval" in scores:
        found = ", ".join(f"{way.replace('_', ' ')} {scores['retrieval'][way]:.2f} %" for way in WAYS)
        lines.append(f"retrieval R@1: {found}")
    if not scores:
        lines.append("no scores: the configuration names neither eval.datasets nor data.val_shards")
    if pictures := [name for name in PICTURES if (run / name).is_file()]:
        lines.append(f"pictures: {', '.join(pictures)} in {run}")
    return "\n".join([*lines, f"next: mixreorg demo --weights {run}"])


def _attention(config: Config, device: torch.device) -> tuple[str, str]:
    """The attention implementations for images and for captions."""
    dtype = config.train.dtype
    image, text = (
        torch.empty(1, 8, part.heads, part.width // part.heads, dtype=dtype, device=device)
        for part in (config.model, config.model.text)
    )
    return chosen(image), chosen(text, Packing.of([8], device))
