"""Hours that the recipes of docs/recipes.md should take: ``python -m benchmarks.recipes``

Counted here, on a CPU: the floating-point operations of a training step of GroupViT-S, by PyTorch's counter. Counted by
``benchmarks.counted``: the activations that a compiled step keeps for backward. The time per image is predicted from
both, and written with its parts to benchmarks/results/recipes.json and to the table of docs/recipes.md. ``--table``
writes the table alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixreorg_fast import ledger, ops
from mixreorg_fast.config import load_config
from mixreorg_fast.data.remote.command import KNOWN
from mixreorg_fast.ops import dispatch

from . import counted, harness
from .test_train_step import CAPTIONS, DEVICE, configuration, our_model, random_batch

RESULTS = harness.RESULTS / "recipes.json"
PAGE = harness.RESULTS.parents[1] / "docs" / "recipes.md"
CONFIGS = PAGE.parents[1] / "configs"
PAIRS = {name: sum(KNOWN[part].samples for part in name.split("_")) for name in ("cc3m", "cc12m", "cc3m_cc12m")}
MATMUL_FLOP_PER_S = 400e12  # of a GPU in bf16, at the sizes of this model: an assumption, 40 % of the data sheet
PASSES = 4  # over a kept activation: written, read in backward; its gradient written and read
IMAGES = 8


def flops() -> tuple[float, float]:
    """Floating-point operations per image: of the features without a graph, and of forward and backward."""
    config = configuration("mixreorg", torch.float32)
    model = our_model(config)
    batch = random_batch(config, IMAGES, CAPTIONS, torch.Generator(DEVICE).manual_seed(0))

    def count(step: Any) -> float:
        with (
            mock.patch.object(dispatch, "passed_over", lambda op, inputs: ["its products are not counted"]),
            sdpa_kernel(SDPBackend.MATH),
            mock.patch.object(ops, "linear", F.linear),  # the counter does not know oneDNN's
            FlopCounterMode(display=False) as counter,
        ):
            step()
        return counter.get_total_flops() / IMAGES

    with torch.no_grad():
        forward = count(lambda: model.features(batch))
    return forward, count(lambda: model(batch)["loss"].backward())


def kept_bytes() -> float:
    """Bytes per image that a compiled step keeps for backward, from benchmarks/results/counted.json."""
    rows = json.loads(counted.RESULTS.read_text())["rows"]
    of_now = [row for row in rows if row.get("what") == "mixreorg, compiled, encoders" and row["state"] == "after"]
    return of_now[-1]["mb_per_image"] * 1e6


def decoded_per_s() -> tuple[float, str]:
    """Images per second that the loader measured, on two CPU cores, and the device's name."""
    (file,) = (file for file in ledger.results_files(harness.RESULTS, ["loader"]) if file["cuda"] is None)
    of_loader = [row for row in file["rows"] if row["op"] == "loader" and row["implementation"] == "ours"]
    return max(row["images_per_s"] for row in of_loader), file["device"]


def rows() -> Iterator[dict[str, Any]]:
    forward, step = flops()
    kept = kept_bytes()
    for recipe, pairs in PAIRS.items():
        for gpus in (1, 8):
            config = load_config(CONFIGS / f"{recipe}{'_1gpu' if gpus == 1 else ''}.json").train
            again = 1 - 1 / config.accumulation if config.grad_cache else 0.0  # share of images with a second forward
            matmul = (step + again * forward) / MATMUL_FLOP_PER_S
            memory = (PASSES + again) * kept / counted.BYTES_PER_S
            yield {
                "suite": "recipes",
                "recipe": recipe,
                "gpus": gpus,
                "pairs": pairs,
                "epochs": config.epochs,
                "forward_gflop": forward * 1e-9,
                "step_gflop": step * 1e-9,
                "forward_again": again,
                "kept_mb": kept * 1e-6,
                "matmul_us": matmul * 1e6,
                "memory_us": memory * 1e6,
                "predicted_images_per_s": gpus / (matmul + memory),
                "predicted_hours": config.epochs * pairs * (matmul + memory) / gpus / 3600,
            }


def table() -> str:
    file = json.loads(RESULTS.read_text())
    head = ["recipe", "pairs", "epochs", "1 H100: images/s", "1 H100: hours", "8 H100: images/s", "8 H100: hours"]
    body = []
    for recipe in PAIRS:
        one, eight = ([row for row in file["rows"] if (row["recipe"], row["gpus"]) == (recipe, n)][0] for n in (1, 8))
        cells = [
            cell
            for row in (one, eight)
            for cell in (f"{row['predicted_images_per_s']:,.0f}", f"{row['predicted_hours']:.1f}")
        ]
        body.append([f"`{recipe}`", f"{one['pairs']:,}", f"{one['epochs']:g}", *cells])
    row = file["rows"][0]
    decoded, device = decoded_per_s()
    cores = [math.ceil(2 * row["predicted_images_per_s"] / decoded) for row in (one, eight)]
    note = (
        f"*Predicted, not measured.* Per image, counted ({file['date'][:10]}, commit {file['commit']}): "
        f"{row['step_gflop']:.1f} GFLOP forward and backward, {row['forward_gflop']:.1f} GFLOP forward, "
        f"{row['kept_mb']:.1f} MB kept for backward.\n\n"
        f"*Measured* on an {device}: two cores read, decode and augment {decoded:.0f} images/s. So {cores[0]} such "
        f"cores feed one GPU, and {cores[1]} feed eight; a GPU with JPEG hardware decodes most photos itself."
    )
    return "\n".join([*ledger.table(head, body), "", note])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the results file; count nothing")
    if not parser.parse_args(argv).table:
        header = {**ledger.versions("python -m benchmarks.recipes"), "predicted_for": counted.COUNTED_FOR["gpu"]}
        rounded = [{key: harness.rounded(value) for key, value in row.items()} for row in rows()]
        ledger.write_rows(RESULTS, header, rounded, keep=lambda row: False)
    ledger.write_page(PAGE, table())


if __name__ == "__main__":
    main()
