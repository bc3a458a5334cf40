"""Weights of every format: ours, Hugging Face's GroupViT folders, NVlabs' .pth files. Writing Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from ..data.text.tokenizer import END, FILES, START, Tokenizer
from ..errors import UserError
from ..files import atomic_path, read_json, write_json
from ..images import IMAGENET_MEAN, IMAGENET_STD
from ..models import pth
from ..models.interop import from_foreign, to_foreign
from ..models.weights import POSITIONS, WEIGHTS, Weights, find_weights, read_tensors, read_weights
from .hub import locate

# What Hugging Face's configuration can vary and ours cannot: the defaults, which its files leave out.
_FIXED = {
    "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "assign_eps": 1.0, "num_channels": 3},
    "text_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
# NVIDIA's weights, in a folder of their name or in the hub's cache. Their preprocessor_config.json has CLIP's values.
_OFFICIAL = {f"{owner}groupvit-gcc-{data}" for owner in ("", "models--nvidia--") for data in ("yfcc", "redcaps")}


def read(source: str | Path) -> Weights:
    """Weights of any format, with their tokenizer where they have one; `source` is as of `hub.locate`.

    Raises:
        UserError: a missing or damaged file, an unknown format, tensors missing, unknown or of wrong sizes.
    """
    place = locate(source)
    if place.is_file():
        return _read_nvlabs(place)
    description = place / "config.json"
    if description.is_file() and "model_type" in (values := read_json(description)):
        return _read_huggingface(place, values)
    folder = find_weights(place)
    return read_weights(folder)._replace(tokenizer=_tokenizer(folder))


def read_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer from a ``tokenizer.json``, a folder with one or with CLIP's two files, or a repository on the hub.
    Errors are those of :meth:`Tokenizer.load` and :func:`~mixreorg_fast.inference.hub.locate`."""
    return Tokenizer.load(locate(source, "tokenizer"))


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if any((folder / name).is_file() for name in FILES) else None


def _read_nvlabs(source: Path) -> Weights:
    content = pth.read(source)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{source}: expected tensors by name, or such under 'model'")
    config, state, ignored = from_foreign(content, "nvlabs", str(source))
    notes = [f"{name} left out: no embedding depends on it" for name in ignored]
    notes += [f"heads are not in the file: {config.heads} and {config.text.heads}, of 64 channels, as in GroupViT"]
    tokenizer = _tokenizer(source.parent)  # such a file holds none
    if tokenizer is not None and tokenizer.vocab_size != config.text.vocab_size:
        tokenizer = None
    return Weights(config, IMAGENET_MEAN, IMAGENET_STD, source, state, tokenizer, notes=tuple(notes))


def _read_huggingface(source: Path, values: dict[str, Any]) -> Weights:
    if values["model_type"] != "groupvit":
        raise UserError(f"{source}: a model of type '{values['model_type']}'; 'groupvit' was expected")
    vision, text = (dict(values.get(section) or {}) for section in _FIXED)
    for section, found in zip(_FIXED, (vision, text), strict=True):
        for key, wanted in _FIXED[section].items():
            if found.get(key, wanted) != wanted:
                raise UserError(f"{source}: {section}.{key} is {found[key]}, only {wanted} is supported")
    size = vision.get("image_size", 224)
    if isinstance(size, list) and len(set(size)) > 1:
        raise UserError(f"{source}: vision_config.image_size is {size}; a square one was expected")
    heads = (vision.get("num_attention_heads", 6), text.get("num_attention_heads", 4))
    config, state, _ = from_foreign(_huggingface_tensors(source), "huggingface", str(source), heads)
    tokenizer = _tokenizer(source)
    # Text features are taken at the highest id; eos_token_id 2 is Hugging Face's older way to say the same.
    end, last = text.get("eos_token_id", 49407), tokenizer.end_id if tokenizer else config.text.vocab_size - 1
    if end not in (2, last):
        raise UserError(f"{source}: text_config.eos_token_id is {end}, but texts must end with the highest id {last}")
    preprocessor = source / "preprocessor_config.json"
    pixels = read_json(preprocessor) if preprocessor.is_file() else {}
    mean, std = pixels.get("image_mean", IMAGENET_MEAN), pixels.get("image_std", IMAGENET_STD)
    notes: tuple[str, ...] = ()
    names = {source.name, *(folder.name for folder in source.absolute().parents[1:2])}  # a snapshot's repository too
    if names & _OFFICIAL and tuple(mean) != IMAGENET_MEAN:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        notes = (f"{source}: ImageNet's normalisation, with which NVIDIA trained, in place of the folder's (CLIP's)",)
    return Weights(config, tuple(mean), tuple(std), source, state, tokenizer, notes=notes)


def _huggingface_tensors(source: Path) -> Mapping[str, Any]:
    path = source / WEIGHTS
    if path.is_file():
        return read_tensors(path)
    path = source / "pytorch_model.bin"
    if not path.is_file():
        raise UserError(f"{source} has a config.json, but neither model.safetensors nor pytorch_model.bin")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage may show as any exception
        raise UserError(f"{path}: not a readable file of tensors: {str(error).splitlines()[0]}") from None


def save_huggingface(network: Any, folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a folder for ``GroupViTModel.from_pretrained`` and ``AutoProcessor.from_pretrained``, atomically.

    `network`: a Model or Weights: sizes, normalisation, tokenizer. `state`: its tensors, the logit scale 0-d. Raises a
    UserError for soft assignment.
    """
    config, text, tokenizer = network.config, network.config.text, network.tokenizer
    if not config.hard_assignment:
        raise UserError(
            "these weights assign patches softly (model.hard_assignment false), but Hugging Face's GroupViT assigns "
            "them hard; weights trained with --set model.hard_assignment=true can be exported"
        )
    if config.tau != 1.0:  # Hugging Face's model has no tau: q is divided by it
        queries = re.compile(r".*\.grouping\.q\.(weight|bias)")
        state = {name: value / config.tau if queries.fullmatch(name) else value for name, value in state.items()}
    end = tokenizer.end_id if tokenizer else text.vocab_size - 1
    # Keys that are left out have the format's default values.
    description = {
        "architectures": ["GroupViTModel"],
        "model_type": "groupvit",
        "dtype": str(state[POSITIONS].dtype).removeprefix("torch."),
        "projection_dim": config.embed_dim,
        "projection_intermediate_dim": config.projection_hidden,
        "vision_config": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_attention_heads": config.heads,
            "num_hidden_layers": sum(config.depths),
            "depths": list(config.depths),
            "num_group_tokens": [*config.groups, 0],
            "num_output_groups": [*config.groups, config.groups[-1]],
        },
        "text_config": {
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "size": {"shortest_edge": config.image_size},
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "image_mean": list(network.mean),
        "image_std": list(network.std),
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: value.contiguous() for name, value in to_foreign(state, "huggingface").items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / "config.json", description)
        write_json(temporary / "preprocessor_config.json", preprocessor)
        if tokenizer is not None:
            save_tokenizer_with_ends(tokenizer, temporary)
            special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
            # CLIPTokenizer would put CLIP's own splitting of words in the place of the file's.
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "CLIPProcessor"}
            settings |= {"model_max_length": text.context, **special}
            write_json(temporary / "tokenizer_config.json", settings)
            write_json(temporary / "special_tokens_map.json", special)


def save_tokenizer_with_ends(tokenizer: Tokenizer, folder: Path, context: int | None = None) -> None:
    """Write a tokenizer.json that adds start and end and truncates to `context` tokens, as
    :meth:`Tokenizer.encode` does with our own files."""
    path = tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, tokenizer.start_id), (END, tokenizer.end_id)]
    )
    if context is not None:
        backend.enable_truncation(context)
    backend.save(str(path))
