"""Weights as a portable folder: ``model.safetensors``, ``model.json``, ``tokenizer.json``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..config import InferenceConfig, ModelConfig, Section, validated
from ..errors import UserError
from ..files import read_json, write_json
from .groupvit import GroupViT
from .image_encoder import resize_positions

WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
FORMAT = "mixreorg_fast/1"
POSITIONS = "image_encoder.positions.weight"


class Description(Section, extra="ignore", validate_default=False):
    """What ``model.json`` holds."""

    format: Literal["mixreorg_fast/1"]
    model: ModelConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    inference: InferenceConfig = None  # type: ignore[assignment] - files of older versions lack it, and none has null


class Weights(NamedTuple):
    """What a folder or a file of weights holds, whatever its format."""

    config: ModelConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: Path  # the file, or the folder that holds the files
    state: Mapping[str, Tensor]  # tensors under our names, in the dtypes of the file; the logit scale is 0-d
    tokenizer: Any = None  # a data.text.tokenizer.Tokenizer
    inference: InferenceConfig | None = None
    notes: tuple[str, ...] = ()  # what a user should know of how they were read


def write_files(network: Any, folder: Path, state: Mapping[str, Tensor], inference: InferenceConfig) -> None:
    """Write model.safetensors and model.json into an existing folder that nobody reads yet.

    Parameters and floating buffers are written in their own dtypes; the logit scale as a 0-d tensor.

    Args:
        network: a GroupViT or Weights, of which sizes and normalisation are read. state: the tensors by name.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    save_file(tensors, folder / WEIGHTS)
    write_description(network, folder, inference)


def write_description(network: Any, folder: Path, inference: InferenceConfig) -> None:
    """Write model.json, as :func:`write_files`."""
    description = Description(
        format=FORMAT, model=network.config, mean=tuple(network.mean), std=tuple(network.std), inference=inference
    )
    write_json(folder / DESCRIPTION, description.model_dump(mode="json", exclude={"model": {"method", "init"}}))


def find_weights(folder: str | Path) -> Path:
    """The folder that holds the weights: `folder` itself, or the newest ``checkpoints/step_*`` of a run."""
    folder = Path(folder)
    for candidate in (folder, *sorted(folder.glob("checkpoints/step_*"), reverse=True)):
        if (candidate / WEIGHTS).is_file():
            return candidate
    raise UserError(
        f"{folder} holds no {WEIGHTS}: expected weights of ours with {DESCRIPTION}, a run with checkpoints, or Hugging "
        "Face's config.json with a model_type"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a :class:`UserError` if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def read_weights(folder: Path) -> Weights:
    """Weights of ours without their tokenizer, from the folder that holds them (see :func:`find_weights`).

    Raises:
        UserError: a file is missing, damaged or of another format, or the tensors do not fit the sizes.
    """
    path = folder / DESCRIPTION
    try:
        found = validated(Description, read_json(path), str(path))
    except OSError:
        raise UserError(f"{folder} holds {WEIGHTS} but no {DESCRIPTION} that says the model's sizes") from None
    state = fitted(read_tensors(folder / WEIGHTS), shapes_of(found.model), str(folder / WEIGHTS))
    return Weights(found.model, found.mean, found.std, folder, state, inference=found.inference)


class _NoDraws(TorchFunctionMode):
    """On the meta device PyTorch draws normal values by its Python decompositions, whose import takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def sizes_only() -> Iterator[None]:
    """Networks that are made in this block have shapes, but neither memory nor initial values."""
    with _NoDraws(), torch.device("meta"):
        yield


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every tensor in our files, for a model of these sizes; takes no memory."""
    with sizes_only():
        shapes = {name: value.shape for name, value in GroupViT(config).state_dict().items()}
    return {**shapes, "logit_scale": torch.Size(())}


def check_names(found: Set[str], expected: Set[str], source: str) -> None:
    """Raise a :class:`UserError` where a tensor is missing or unknown."""
    for kind, odd in (("lacks", expected - found), ("has an unknown", found - expected)):
        if odd:
            raise UserError(f"{source} {kind} tensor '{min(odd)}' ({len(odd)} such in all)")


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str) -> None:
    """Raise a :class:`UserError` where a tensor is not of its shape."""
    for name, value in state.items():
        if value.shape != shapes[name]:
            raise UserError(f"{source}: '{name}' is {list(value.shape)}, the model needs {list(shapes[name])}")


def fitted(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str) -> dict[str, Tensor]:
    """`state` for a model of these `shapes`: positions of another resolution are interpolated (bicubic).
    Raises a :class:`UserError` if a tensor is missing, unknown or of another shape."""
    check_names(state.keys(), shapes.keys(), source)
    state = dict(state)
    if state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(shapes["logit_scale"])
    found, wanted = state[POSITIONS].shape, shapes[POSITIONS]
    # Only a square grid of patches can be taken to another size; anything else is refused below.
    if found != wanted and len(found) == 3 and math.isqrt(found[1]) ** 2 == found[1]:
        side = math.isqrt(wanted[1])
        state[POSITIONS] = resize_positions(state[POSITIONS], side, side)
    check_shapes(state, shapes, source)
    return state


def fill(model: GroupViT, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill `model` with tensors of a file, as :func:`fitted` makes them fit; `source` names the file in errors."""
    model.load_state_dict(fitted(state, {key: value.shape for key, value in model.state_dict().items()}, str(source)))
