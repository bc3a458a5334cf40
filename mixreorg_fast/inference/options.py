"""The command line of inference: one option per setting, shared by `segment`, `evaluate` and `demo`."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from .. import devices
from ..config import InferenceConfig
from ..errors import UserError
from ..names import TEMPLATES
from .model import Model, load


def add_options(parser: argparse.ArgumentParser, decoding: str) -> None:
    """Every setting, the batch size and the device; `decoding`: the command's default."""
    for name in InferenceConfig.model_fields:
        add_option(parser, name, decoding if name == "decoding" else None)
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="photos per forward pass (8)")
    add_device(parser)


def add_option(parser: argparse.ArgumentParser, name: str, default: str | None = None) -> None:
    """The setting `name` of :class:`~mixreorg_fast.config.InferenceConfig`; default None: the weights' setting."""
    field = InferenceConfig.model_fields[name]
    about = field.description
    if get_origin(field.annotation) is Literal:
        kind = {"choices": get_args(field.annotation)}
    elif field.annotation is int:
        kind = {"type": int, "metavar": "PX"}
    elif name == "templates":
        kind, about = {"metavar": "NAME"}, f"{about}: {', '.join(TEMPLATES)}, or a template of your own"
    else:
        kind = {"type": float, "metavar": "X"}
    about = f"{about} (default: {default or 'as in the weights'})"
    parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=about, **kind)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: the GPU, or the CPU of a machine without")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the options of :func:`add_options` give, None for those of the weights.

    Raises:
        UserError: `--batch` below 1.
    """
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, got {args.batch}")
    return {name: getattr(args, name) for name in InferenceConfig.model_fields}


def load_on_device(weights: str, device: str | None) -> Model:
    """The model in folder `weights`, on the `device` of :func:`mixreorg_fast.devices.choose`.

    Raises:
        UserError: as these two; weights without a tokenizer.
    """
    model = load(weights, devices.choose(device))
    if model.tokenizer is None:
        raise UserError(f"{weights}: no tokenizer.json, so class names cannot be read")
    return model
