"""Programs that run without this package, made of weights: ONNX, or PyTorch's exported programs."""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from .errors import UserError, extra
from .files import atomic_path, check_new_folder, saving
from .inference.formats import save_tokenizer_with_ends
from .inference.model import load
from .models import GroupViT
from .models.groupvit import class_scores, image_threshold
from .models.weights import write_description
from .ops import decode_segments

MOST_PATCHES = 1024  # along a side of a photo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="weights as of `mixreorg segment`: a folder, a run, a .pth file, a hub name")
    parser.add_argument("--to", choices=("onnx", "torch"), default="onnx", help="format to write (default: onnx)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: NAME-onnx or NAME-torch here)")


def main(args: argparse.Namespace) -> None:
    target = args.out or Path(f"{Path(args.weights).resolve().name.partition('@')[0]}-{args.to}")
    check_new_folder(target)
    if args.to == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError(f"--to onnx needs onnx and onnxscript: {extra('onnx')}")
    model = load(args.weights).float()
    with saving(target), atomic_path(target.resolve()) as folder:
        folder.mkdir()
        for name, program in programs(model).items():
            if args.to == "onnx":
                write_onnx(program, NAMES[name], folder / f"{name}.onnx")
            else:
                torch.export.save(program, folder / f"{name}.pt2")
        write_description(model, folder, model.inference)
        if model.tokenizer is not None:
            save_tokenizer_with_ends(model.tokenizer, folder, model.config.text.context)
        sizes = [
            f"{path.name} {path.stat().st_size / 1e6:.1f} MB"
            for path in sorted(folder.glob("*.onnx" if args.to == "onnx" else "*.pt2"))
        ]
    print(f"{target}: {', '.join(sizes)}")


class ImageProgram(nn.Module):
    """Photos and class embeddings to labels, with the weights of `model`."""

    def __init__(self, model: GroupViT) -> None:
        super().__init__()
        self.model = model
        self.mean = nn.Buffer(torch.tensor(model.mean)[:, None, None])
        self.std = nn.Buffer(torch.tensor(model.std)[:, None, None])

    def forward(self, images: Tensor, texts: Tensor, background_threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels int64 ``[B, H, W]``: 0 is the background, class t is t + 1; class scores of the segments in 0..1,
        ``[B, G, T]``; soft map of patches to segments, ``[B, G, h, w]``.

        Args:
            images: ``[B, 3, H, W]``, RGB in 0..1; H and W multiples of the patch size.
            texts: ``[T, D]``, class embeddings of any length.
            background_threshold: 0-d, 0..1. A segment is background where its best score is below min(this, the image's
                best score); with 0 no segment is background.
        """
        seen = self.model.segments((images - self.mean) / self.std)
        scores = class_scores(seen.embeddings, seen.image, F.normalize(texts, dim=-1), self.model.logit_multiplier())
        threshold = image_threshold(scores, background_threshold)
        size = (images.shape[2], images.shape[3])
        return decode_segments(seen.maps, scores, size, background_threshold=threshold), scores, seen.maps


class TextProgram(nn.Module):
    """Token ids to embeddings, with the weights of `model`."""

    def __init__(self, model: GroupViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[B, D]`` of token ids int64 ``[B, L]``, pooled at the first occurrence of the highest id.

        They are not normalised: the mean over the prompts of a class comes first.
        """
        encoder = self.model.text_encoder
        tokens = encoder.token_embedding(ids) + encoder.position_embedding(torch.arange(ids.shape[1]))
        for block in encoder.blocks:
            tokens = block(tokens)
        pooled = encoder.norm(tokens[torch.arange(ids.shape[0]), ids.argmax(dim=1)])
        return self.model.text_projection(pooled, normalise=False)


# Inputs and outputs of the programs.
NAMES = {
    "image": (["images", "texts", "background_threshold"], ["labels", "scores", "maps"]),
    "text": (["ids"], ["embeddings"]),
}


@torch.no_grad()
def programs(model: GroupViT) -> dict[str, ExportedProgram]:
    """:class:`ImageProgram` as "image" and :class:`TextProgram` as "text", for any number of photos, classes and
    prompts, any resolution, and prompts of up to the context's length. `model` is in fp32 and in evaluation mode."""
    patch, context = model.config.patch_size, model.config.text.context
    sides = [patch * Dim(name, min=1, max=MOST_PATCHES) for name in ("patches_down", "patches_across")]
    images, texts = torch.zeros(2, 3, 2 * patch, 3 * patch), torch.ones(3, model.config.embed_dim)
    photos = ({0: Dim("photos"), 2: sides[0], 3: sides[1]}, {0: Dim("classes")}, None)
    ids = torch.zeros(2, min(3, context), dtype=torch.int64)
    prompts = ({0: Dim("prompts"), 1: Dim("tokens", max=context)},)
    return {
        "image": export(ImageProgram(model).eval(), (images, texts, torch.tensor(0.5)), dynamic_shapes=photos),
        "text": export(TextProgram(model).eval(), (ids,), dynamic_shapes=prompts),
    }


def write_onnx(program: ExportedProgram, names: tuple[list[str], list[str]], path: Path) -> None:
    """Write `program` as one file with its weights; `names`: of its inputs and outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about code of the exporter, not of this package
        written = torch.onnx.export(program, dynamo=True, input_names=names[0], output_names=names[1], verbose=False)
    assert written is not None
    written.save(path, external_data=False)
