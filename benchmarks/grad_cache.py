"""Peak memory of forward and backward over one batch: at once, and with train.grad_cache in ever smaller micro-steps.

    python -m benchmarks.grad_cache                          # GroupViT-S, 32 images of 112 px, 1 to 8 micro-steps
    python -m benchmarks.grad_cache --images 256 --side 224

Each case runs in a process of its own. Memory is the rise of the resident set (on a GPU: of allocated memory) during a
step, with parameters, gradients and images in place before it.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import torch

from mixreorg_fast.models import Batch, MixReorg

from .memory import peak_bytes
from .test_train_step import CAPTIONS, DEVICE, configuration, random_batch


def part(batch: Batch, start: int, images: int) -> Batch:
    rows = slice(start, start + images)
    tensors = {"images": batch.images[rows], "ids": batch.ids[rows], "lengths": batch.lengths[rows]}
    return replace(batch, **tensors, first_image=start)


def step(model: MixReorg, batches: list[Batch]) -> None:
    """As the trainer does it."""
    *others, last = batches
    with torch.no_grad():
        cached = [model.features(batch).cached() for batch in others]
    model(last, cached)["loss"].backward()
    for batch, features in zip(others, cached, strict=True):
        model(batch, gradients=features.gradients())["loss"].backward()


def measure(images: int, side: int, parts: int) -> dict:
    config = configuration("mixreorg", torch.bfloat16 if DEVICE.type == "cuda" else torch.float32, image_size=side)
    model = MixReorg(config).to(DEVICE)
    batch = random_batch(config, images, CAPTIONS, torch.Generator(DEVICE).manual_seed(0))
    step(model, [part(batch, 0, config.mixing.group_size)])  # gradients are made, libraries load
    parted = [part(batch, start, images // parts) for start in range(0, images, images // parts)]
    peak = peak_bytes(lambda: step(model, parted))
    return {"images": images, "side": side, "micro_steps": parts, "peak_mb": round(peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=112, help="pixels")
    parser.add_argument("--parts", type=int, help="micro-steps; default: 1, 2, 4 and 8, one after the other")
    options = parser.parse_args()
    if options.parts:
        print(json.dumps(measure(options.images, options.side, options.parts)))
        return
    for parts in (1, 2, 4, 8):
        subprocess.run([sys.executable, "-m", "benchmarks.grad_cache", *sys.argv[1:], "--parts", str(parts)])


if __name__ == "__main__":
    main()
