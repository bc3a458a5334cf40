"""The command line of inference: one option per setting, shared by `segment`, `evaluate` and `demo`."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from .. import devices
from ..config import InferenceConfig
from ..errors import UserError
from ..names import TEMPLATES
from .model import Model, load

SWEEP = "; sweep: score every threshold from 0 to 1 in steps of 0.05, too"
WEIGHTS_HELP = "a folder of weights, a run's folder, a .pth file, or owner/name[@revision] on the Hugging Face hub"


def add_options(parser: argparse.ArgumentParser, *names: str, decoding: str | None = None, sweep: bool = False) -> None:
    """Options for the settings `names` (default: all, and the batch size) and for the device.

    Args:
        decoding: the command's default; every other default is the weights' setting.
        sweep: take "sweep" for a background threshold, too.
    """

    def threshold(text: str) -> float | str:
        return text if text == "sweep" else float(text)

    kinds: dict[str, dict[str, Any]] = {
        "background_threshold": {"type": threshold, "metavar": "X|sweep"} if sweep else {"type": float, "metavar": "X"},
        "templates": {"metavar": f"{'|'.join(TEMPLATES)}|TEXT"},
    }
    for name in names or InferenceConfig.model_fields:
        field, default = InferenceConfig.model_fields[name], decoding if name == "decoding" else None
        kind: dict[str, Any] = kinds.get(name, {"type": int, "metavar": "PX"})
        if get_origin(field.annotation) is Literal:
            kind = {"choices": get_args(field.annotation)}
        also = SWEEP if sweep and name == "background_threshold" else ""
        about = f"{field.description}{also} (default: {default or 'as in the weights'})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=about, **kind)
    if not names:
        parser.add_argument("--batch", type=int, default=8, metavar="N", help="photos or windows per forward pass (8)")
    parser.add_argument("--device", help="default: the GPU, or the CPU of a machine without")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the options of :func:`add_options` give; None: the weights' setting. Raises a UserError for a
    `--batch` below 1."""
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, got {args.batch}")
    return {name: getattr(args, name) for name in InferenceConfig.model_fields}


def load_on_device(weights: str, device: str | None) -> Model:
    """The model of `weights`, on the `device` of `devices.choose`. Raises a UserError if it has no tokenizer."""
    model = load(weights, devices.choose(device))
    if model.tokenizer is None:
        raise UserError(
            f"{weights} has no tokenizer, so class names cannot be read: put CLIP's tokenizer.json beside the file, or "
            "add one by `mixreorg convert --tokenizer`"
        )
    return model
