"""Weights between our folders, Hugging Face's GroupViT folders and NVlabs' .pth files."""

from __future__ import annotations

import argparse
from pathlib import Path

from .errors import UserError
from .files import check_new_folder, saving
from .inference.formats import read, read_tokenizer, save_huggingface
from .inference.model import Model
from .inference.options import WEIGHTS_HELP
from .models.weights import sizes_only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=WEIGHTS_HELP)
    parser.add_argument("target", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument("--to", choices=("ours", "hf"), default="ours", help="format to write (default: ours)")
    parser.add_argument(
        "--tokenizer", help="for weights without one: a tokenizer.json, its folder, or owner/name on the hub"
    )


def main(args: argparse.Namespace) -> None:
    check_new_folder(args.target)
    found = read(args.source)
    if args.tokenizer is not None:
        found = found._replace(tokenizer=read_tokenizer(args.tokenizer))
    for note in found.notes:
        print(note)
    config = found.config
    if found.tokenizer is None:
        print(f"no tokenizer in {args.source}: class names need one; --tokenizer adds it (CLIP's for official weights)")
    elif (ids := found.tokenizer.vocab_size) > config.text.vocab_size:
        raise UserError(f"the tokenizer has {ids} ids, but {args.source} has embeddings for {config.text.vocab_size}")
    with saving(args.target):
        if args.to == "hf":
            save_huggingface(found, args.target.resolve(), found.state)
        else:
            with sizes_only():
                model = Model(config, found.mean, found.std, found.tokenizer, found.inference)
            model.save(args.target.resolve(), found.state)
    size = sum(value.numel() for value in found.state.values()) / 1e6
    print(f"{args.target}: {size:.1f} million parameters, {config.image_size} px, {config.groups[1]} segments")
