"""Weights between our folders, Hugging Face's GroupViT folders and NVlabs' .pth files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from .config import ModelConfig
from .data.text.tokenizer import END, START, Tokenizer
from .errors import UserError
from .files import atomic_path, write_json
from .images import IMAGENET_MEAN, IMAGENET_STD
from .inference.model import Model, load
from .models import pth, weights
from .models.interop import from_foreign, to_foreign

# What Hugging Face's configuration can vary and ours cannot; also its defaults, which its files leave out.
_FIXED = {
    "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "assign_eps": 1.0, "num_channels": 3},
    "text_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
# How CLIP's tokenizer splits a text, to the letter.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a Hugging Face folder, an NVlabs .pth, a run or weights of ours")
    parser.add_argument("target", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument("--to", choices=("ours", "hf"), default="ours", help="format to write (default: ours)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, or a folder with one, for weights without")


def main(args: argparse.Namespace) -> None:
    if args.target.exists() and not (args.target.is_dir() and not any(args.target.iterdir())):
        raise UserError(f"{args.target} exists and is not an empty folder; name another one")
    model, state = read(args.source)
    if args.tokenizer is not None:
        model.tokenizer = read_tokenizer(args.tokenizer)
    config = model.config
    if model.tokenizer is None:
        print(f"no tokenizer in {args.source}: texts need one, which --tokenizer takes (CLIP's for official weights)")
    elif model.tokenizer.vocab_size > config.text.vocab_size:
        raise UserError(
            f"the tokenizer has {model.tokenizer.vocab_size} ids, but {args.source} has embeddings for "
            f"{config.text.vocab_size}"
        )
    try:
        (Model.save if args.to == "ours" else save_huggingface)(model, args.target.resolve(), state)
    except OSError as error:
        raise UserError(f"{args.target} cannot be written: {error}") from None
    size = sum(value.numel() for value in state.values()) / 1e6
    print(f"{args.target}: {size:.1f} million numbers, {config.image_size} px, {config.groups[1]} segments")


def read(source: Path) -> tuple[Model, dict[str, Tensor]]:
    """Weights of any format: a model without memory for its tensors (sizes, normalisation, tokenizer), and the
    tensors under our names, in the dtypes of the file, the logit scale 0-d.

    Raises:
        UserError: a missing or damaged file, an unknown format, tensors missing, unknown or of wrong sizes.
    """
    if source.is_file():
        return _read_nvlabs(source)
    if not source.is_dir():
        raise UserError(f"no file or folder {source}")
    description = source / "config.json"
    if description.is_file() and "model_type" in (values := _read_json(description)):
        return _read_huggingface(source, values)
    if (source / weights.WEIGHTS).is_file() or (source / "checkpoints").is_dir():
        return _read_ours(source)
    raise UserError(
        f"{source} is not recognised: expected a Hugging Face folder (config.json with a model_type), a .pth file, or "
        f"a run or weights of ours ({weights.DESCRIPTION})"
    )


def _skeleton(config: ModelConfig, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD, tokenizer=None) -> Model:
    with torch.device("meta"):
        return Model(config, mean, std, tokenizer)


# ---------------------------------------------------------------------- reading


def _read_ours(source: Path) -> tuple[Model, dict[str, Tensor]]:
    folder = weights.find_weights(source)
    model = load(folder)
    dtypes = {name: value.dtype for name, value in load_file(folder / weights.WEIGHTS).items()}
    state = {name: value.to(dtypes[name]) for name, value in model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    return model, state


def _read_nvlabs(source: Path) -> tuple[Model, dict[str, Tensor]]:
    content = pth.read(source)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{source}: expected tensors by name, or such under 'model'")
    config, state, ignored = from_foreign(content, "nvlabs", str(source))
    for name in ignored:
        print(f"{name} left out: no embedding depends on it")
    print(f"heads are not in the file: {config.heads} and {config.text.heads}, of 64 channels, as in GroupViT")
    return _skeleton(config), state


def _read_huggingface(source: Path, values: dict[str, Any]) -> tuple[Model, dict[str, Tensor]]:
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
    path, state = _huggingface_tensors(source)
    config, state, _ = from_foreign(state, "huggingface", str(path), heads)
    tokenizer = None
    if any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = read_tokenizer(source)
    _check_end(source, text.get("eos_token_id", 49407), config, tokenizer)
    preprocessor = source / "preprocessor_config.json"
    pixels = _read_json(preprocessor) if preprocessor.is_file() else {}
    mean, std = pixels.get("image_mean", IMAGENET_MEAN), pixels.get("image_std", IMAGENET_STD)
    return _skeleton(config, mean, std, tokenizer), state


def _check_end(source: Path, end: int, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Text features are taken at the highest id; eos_token_id 2 is Hugging Face's older way to say the same."""
    highest = config.text.vocab_size - 1 if tokenizer is None else tokenizer.end_id
    if end not in (2, highest):
        raise UserError(
            f"{source}: text_config.eos_token_id is {end}, but texts must end with the highest id {highest}"
        )


def _huggingface_tensors(source: Path) -> tuple[Path, Mapping[str, Tensor]]:
    path = source / "model.safetensors"
    if path.is_file():
        try:
            return path, load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    path = source / "pytorch_model.bin"
    if not path.is_file():
        raise UserError(f"{source} has a config.json, but neither model.safetensors nor pytorch_model.bin")
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage may show as any exception
        raise UserError(f"{path}: not a readable file of tensors: {str(error).splitlines()[0]}") from None


def read_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, of a folder with one, or of one with ``vocab.json`` and ``merges.txt``.

    Raises:
        UserError: no tokenizer, or one of another kind than CLIP's.
    """
    vocabulary, merges = source / "vocab.json", source / "merges.txt"
    if (source / "tokenizer.json").is_file() or not vocabulary.is_file():
        return Tokenizer.load(source)
    try:
        bpe = models.BPE.from_file(str(vocabulary), str(merges), unk_token=END, end_of_word_suffix="</w>")
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source}: vocab.json and merges.txt are no tokenizer: {error}") from None
    backend = tokenizers.Tokenizer(bpe)
    # CLIP's: lower case, single spaces, words before bytes.
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return Tokenizer(backend, source=str(vocabulary))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object at the top, got {type(values).__name__}")
    return values


# ---------------------------------------------------------------------- writing Hugging Face's


def save_huggingface(model: Model, folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a folder for ``GroupViTModel.from_pretrained`` and ``AutoProcessor.from_pretrained``, atomically.

    Args:
        model: sizes, normalisation and tokenizer. state: its tensors as :func:`read` gives them.
    Raises:
        UserError: the model's assignment is soft.
    """
    if not model.config.hard_assignment:
        raise UserError(
            "these weights assign patches softly (model.hard_assignment false), which no GroupViT does; weights "
            "trained with --set model.hard_assignment=true can be exported"
        )
    state = _without_temperature(state, model.config.tau)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: value.contiguous() for name, value in to_foreign(state, "huggingface").items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        dtype = str(state["image_encoder.positions.weight"].dtype).removeprefix("torch.")
        write_json(temporary / "config.json", _huggingface_config(model, dtype))
        write_json(temporary / "preprocessor_config.json", _huggingface_preprocessor(model))
        if model.tokenizer is not None:
            _save_huggingface_tokenizer(model.tokenizer, temporary, model.config.text.context)


def _without_temperature(state: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
    """The tensors with the temperature `tau` of the assignment divided into q, for a model without this setting."""
    queries = re.compile(r".*\.grouping\.q\.(weight|bias)")
    return {name: value / tau if tau != 1.0 and queries.fullmatch(name) else value for name, value in state.items()}


def _huggingface_config(model: Model, dtype: str) -> dict[str, Any]:
    config, text = model.config, model.config.text
    end = text.vocab_size - 1 if model.tokenizer is None else model.tokenizer.end_id
    return {
        "architectures": ["GroupViTModel"],
        "model_type": "groupvit",
        "dtype": dtype,
        "projection_dim": config.embed_dim,
        "projection_intermediate_dim": config.projection_hidden,
        "vision_config": {
            "model_type": "groupvit_vision_model",
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_attention_heads": config.heads,
            "num_hidden_layers": sum(config.depths),
            "depths": list(config.depths),
            "num_group_tokens": [*config.groups, 0],
            "num_output_groups": [*config.groups, config.groups[-1]],
            "assign_mlp_ratio": [0.5, 4],
            **_FIXED["vision_config"],
        },
        "text_config": {
            "model_type": "groupvit_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            **_FIXED["text_config"],
        },
    }


def _huggingface_preprocessor(model: Model) -> dict[str, Any]:
    side = model.config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }


def _save_huggingface_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    path = tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(path))
    # Ours adds start and end itself; transformers leaves that to the file.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, tokenizer.start_id), (END, tokenizer.end_id)]
    )
    backend.save(str(path))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    # CLIPTokenizer would put CLIP's own splitting of words in the place of the file's.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "CLIPProcessor"}
    write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": context, **special})
    write_json(folder / "special_tokens_map.json", special)
