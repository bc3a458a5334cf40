"""What this installation can use: the libraries, each op's implementations, and with --kernels their resources."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import __version__, ops
from .devices import cuda_available, cuda_problem, driver
from .errors import UserError
from .kernels.variants import ARCHITECTURES
from .ops.attention import xformers_problems
from .ops.dispatch import TRITON_INSTALLED, CannotRun, UnknownImplementation

# Library -> its module, and the distributions that may contain it.
LIBRARIES = {
    "Triton": ("triton", ("triton",)),
    "xformers": ("xformers", ("xformers",)),
    "DALI": ("nvidia.dali", ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")),
    "DeepSpeed": ("deepspeed", ("deepspeed",)),
    "pyarrow": ("pyarrow", ("pyarrow",)),
    "transformers": ("transformers", ("transformers",)),
    "Gradio": ("gradio", ("gradio",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="registers, spills and shared memory of every Triton kernel, compiled offline per architecture",
    )


def main(args: argparse.Namespace) -> int:
    rows = [("mixreorg_fast", __version__), ("Python", platform.python_version()), ("torch", torch.__version__)]
    rows += [("CUDA", cuda()), *((name, library(*where)) for name, where in LIBRARIES.items())]
    xformers_problems()  # imports xformers, which must not happen under the fake tensors below
    print(table(rows))
    print("\nops on " + ("CUDA" if torch.cuda.is_available() else "the CPU"))
    print(table([(op, name, reasons) for op, name, reasons in implementations()]))
    if args.kernels:
        rows = kernel_resources()
        columns = ("kernel", "architecture", "num_warps", "registers", "spill_bytes", "shared_bytes", "fits", "call")
        print("\n" + table([columns, *([str(row[name]) for name in columns] for row in rows)]))
        wrong = [f"{row['kernel']}, sm_{row['architecture']}: {fault}" for row in rows for fault in row["faults"]]
        excessive = sum(bool(row["spill_bytes"]) or not row["fits"] for row in rows)
        print(f"\n{excessive} of {len(rows)} variants spill registers or need more shared memory than their GPU has")
        print(*(["miscompiled:", *wrong] if wrong else ["no known miscompilation"]), sep="\n")
        return int(excessive > 0 or bool(wrong))
    return 0


def cuda() -> str:
    """The GPUs, or why there are none."""
    if not cuda_available():
        if (problem := cuda_problem()) is not None:
            return f"no: {problem}"
        if torch.version.cuda is None:
            return "no: this PyTorch is built without CUDA"
        return f"no: PyTorch is built for CUDA {torch.version.cuda}, but there is no usable device"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)
    return ", ".join([str(torch.version.cuda), *filter(None, [str(driver() or "")]), names])


def library(module: str, distributions: Sequence[str]) -> str:
    """The installed version; nothing is imported."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        return "no: not installed"
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "yes"


def implementations() -> list[tuple[str, str, str]]:
    """(op, implementation, "yes" or why not), found by forcing each one on fake tensors: nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with FakeTensorMode(), device:
        for op, call in _calls(device).items():
            try:
                call(impl="which?")
            except UnknownImplementation as error:
                known = error.known
            for name in known:
                try:
                    call(impl=name)
                    rows.append((op, name, "yes"))
                except CannotRun as error:
                    rows.append((op, name, "no: " + "; ".join(error.reasons)))
    return rows


def _calls(device: torch.device) -> dict[str, Callable[..., Any]]:
    """Every op on small inputs, waiting for `impl`."""
    plan = ops.MixPlan.sample(4, 16, 4, device=device, impl="torch")
    x, q, maps = torch.empty(4, 16, 64), torch.empty(4, 8, 64), torch.empty(4, 8, 4, 4)
    first, second, texts = torch.empty(4, 8, 16), torch.empty(4, 8, 8), torch.empty(4, 64)
    heads, branches = torch.empty(4, 16, 2, 32), torch.empty(8, 16, 64)
    return {
        "MixPlan.sample": partial(ops.MixPlan.sample, 4, 16, 4, device=device),
        "patch_mix": partial(ops.patch_mix, x, plan),
        "patch_restore": partial(ops.patch_restore, x, plan),
        "patch_blend": partial(ops.patch_blend, x, x, plan, 0.5),
        "mix_tokens": partial(ops.mix_tokens, x, plan),
        "restore_tokens": partial(ops.restore_tokens, branches, plan),
        "blend_tokens": partial(ops.blend_tokens, branches, plan, 0.5),
        "stochastic_depth": partial(ops.stochastic_depth, 1, [0.1], 4, device=device),
        "grouping_attention": partial(ops.grouping_attention, q, x, x),
        "mixed_segmentation_loss": partial(ops.mixed_segmentation_loss, first, second, q, texts, plan, 1.0),
        "contrastive_loss": partial(ops.contrastive_loss, texts, texts, 1.0),
        "decode_segments": partial(ops.decode_segments, maps, q, (8, 8)),
        "attention": partial(ops.attention, heads, heads, heads),
        "linear": partial(ops.linear, texts, texts),
    }


def kernel_resources(architectures: Sequence[int] = ARCHITECTURES, only: str = "") -> list[dict[str, Any]]:
    """The rows of :mod:`.resources` for calls whose name contains `only`, from one process per architecture.

    Raises:
        UserError: Triton is not installed.
    """
    if not TRITON_INSTALLED:
        raise UserError("info --kernels: Triton is not installed; expected triton >= 3.6 (pip install triton)")
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def compile_for(architecture: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "mixreorg_fast.resources", "--architectures", str(architecture)]
        result = subprocess.run([*command, "--only", only], env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
        return [json.loads(line) for line in result.stdout.splitlines()]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [row for rows in pool.map(compile_for, architectures) for row in rows]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    from .cli import main as command

    sys.exit(command(["info", *sys.argv[1:]]))
