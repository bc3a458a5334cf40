"""Weights as a portable folder: ``model.safetensors``, ``model.json``, ``tokenizer.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import InferenceConfig, ModelConfig, describe
from ..errors import UserError
from ..files import write_json
from .groupvit import GroupViT
from .image_encoder import resize_positions

WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
FORMAT = "mixreorg_fast/1"


def write_files(
    network: GroupViT,
    folder: Path,
    state: Mapping[str, Tensor],
    inference: InferenceConfig,
) -> None:
    """Write model.safetensors and model.json into an existing folder that nobody reads yet.

    Parameters and floating buffers are written in their own dtypes; the logit scale as a 0-d tensor.

    Args:
        state: the tensors by name; of `network` only the sizes and the normalisation are read.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    save_file(tensors, folder / WEIGHTS)
    description = {
        "format": FORMAT,
        "model": network.config.model_dump(exclude={"method", "init"}),
        "mean": list(network.mean),
        "std": list(network.std),
        "inference": inference.model_dump(mode="json"),
    }
    write_json(folder / DESCRIPTION, description)


def find_weights(folder: str | Path) -> Path:
    """The folder that holds the weights: `folder` itself, or the newest ``checkpoints/step_*`` of a run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; weights are a folder with {WEIGHTS}, {DESCRIPTION} and {TOKENIZER}")
    candidates = [folder, *sorted(folder.glob("checkpoints/step_*"), reverse=True)]
    for candidate in candidates:
        if (candidate / WEIGHTS).is_file():
            return candidate
    raise UserError(f"{folder} holds no {WEIGHTS}; other formats become ours by `mixreorg convert {folder} TARGET`")


def load_state(model: GroupViT, folder: str | Path) -> None:
    """Fill `model` from a folder of weights; positions of another resolution are interpolated (bicubic).

    Raises:
        UserError: the file is damaged, or a tensor is missing, unknown or of another shape.
    """
    path = Path(folder) / WEIGHTS
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    own = model.state_dict()
    for kind, keys in (("lacks", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        if keys:
            raise UserError(f"{path} {kind} tensor '{min(keys)}' ({len(keys)} such in all)")
    if state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(1)
    positions = "image_encoder.positions.weight"
    found, wanted = state[positions].shape, own[positions].shape
    # Only a square grid of patches can be taken to another size; anything else is refused below.
    if found != wanted and len(found) == 3 and math.isqrt(found[1]) ** 2 == found[1]:
        side = math.isqrt(wanted[1])
        state[positions] = resize_positions(state[positions], side, side)
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(f"{path}: '{key}' is {list(value.shape)}, the model needs {list(own[key].shape)}")
    model.load_state_dict(state)


def read_description(folder: Path) -> dict[str, Any]:
    """What ``model.json`` says: ``config``, ``mean``, ``std`` and ``inference`` (None in files of older versions).

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise UserError(f"{path}: format '{description['format']}' is not '{FORMAT}'")
        section, schema = "model", ModelConfig
        config = schema.model_validate_json(json.dumps(description[section]), strict=True)
        inference = None
        if "inference" in description:
            section, schema = "inference", InferenceConfig
            inference = schema.model_validate_json(json.dumps(description[section]), strict=True)
        return {"config": config, "mean": description["mean"], "std": description["std"], "inference": inference}
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds {WEIGHTS} but no {DESCRIPTION} that says the model's sizes; Hugging Face's folders become "
            f"ours by `mixreorg convert {folder} TARGET`"
        ) from None
    except ValidationError as error:
        raise UserError(f"{path}: {section}: {describe(error, schema)}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a description of a model: {error!r}") from None
