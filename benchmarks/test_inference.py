"""Zero-shot segmentation by 150 classes: whole photos through the network, and the decoding of sliding windows."""

from __future__ import annotations

import copy
import tempfile
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from mixreorg_fast import accelerate
from mixreorg_fast.config import ModelConfig, TextConfig
from mixreorg_fast.evaluation.decoding import decode, decode_groupvit_reference, window_boxes
from mixreorg_fast.models import GroupViT
from mixreorg_fast.models.convert import save_huggingface
from mixreorg_fast.models.decoding import class_scores

from .harness import DEVICE, ON_GPU, Case, Work, matrix
from .test_decoding import dense

CLASSES = 150
# GroupViT's full size. Batch, the network's input, the photo.
WHOLE = (32, 448, (512, 683)) if ON_GPU else (1, 224, (256, 341))
# The network's input, cut into windows of 448 px every 224 px, and the photo: ADE20K's usual and largest ones.
SLIDING = [((448, 592), (512, 683)), *([((448, 640), (2100, 3000))] if ON_GPU else [])]


@cache
def our_model(side: int) -> GroupViT:
    torch.manual_seed(0)
    return GroupViT(ModelConfig(image_size=side, text=TextConfig(vocab_size=49408))).to(DEVICE).eval()


@cache
def their_model(side: int):
    """The same weights in Hugging Face's implementation."""
    transformers = pytest.importorskip("transformers", reason="needs the Hugging Face extra")
    ours = our_model(side)
    with tempfile.TemporaryDirectory() as folder:
        state = ours.state_dict()
        save_huggingface(ours, folder, state | {"logit_scale": state["logit_scale"].reshape(())})
        return transformers.GroupViTModel.from_pretrained(folder).to(DEVICE).eval()


@torch.no_grad()
def eager(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Our network, and a decoding that holds the scores of every class at every pixel."""
    model = our_model(images.shape[2])
    seen = model.segments(images)
    scores = class_scores(seen.embeddings, seen.image, texts, model.logit_multiplier())
    return dense(seen.maps, scores, size)


def ours(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return our_model(images.shape[2]).segment_labels(images, texts, size=size)


@torch.no_grad()
def huggingface(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Hugging Face's network, and the same decoding."""
    model = their_model(images.shape[2])
    vision = model.vision_model(images, output_attentions=True)
    first, second = vision.attentions
    segments, side = vision.last_hidden_state, images.shape[2] // 16
    embeddings = F.normalize(model.visual_projection(segments.flatten(0, 1)), dim=-1).unflatten(0, segments.shape[:2])
    image = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    scores = class_scores(embeddings, image, texts, model.logit_scale.exp().clamp(max=100.0))
    return dense((second @ first).unflatten(2, (side, side)), scores, size)


@cache
def accelerated_model(side: int):
    return accelerate(copy.deepcopy(their_model(side)))


def accelerated(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Hugging Face's network with the fast ops put in."""
    return accelerated_model(images.shape[2]).segment_labels(images, texts, size=size)


def whole(batch: int, side: int, size: tuple[int, int]) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        images = torch.randn(batch, 3, side, side, device=DEVICE, generator=generator)
        texts = torch.randn(CLASSES, 256, device=DEVICE, generator=generator)
        return images, F.normalize(texts, dim=-1), size

    return Case(
        suite="inference",
        op="segment_labels",
        shape=f"{batch}x3x{side}x{side} to {size[0]}x{size[1]} T={CLASSES}",
        batch=batch,
        dtype=torch.float32,
        inputs=inputs,
        implementations={"eager": eager, "ours": ours, "huggingface": huggingface, "accelerated": accelerated},
        work={"fwd": Work()},
        modes=("fwd",),
    )


def sliding(network: tuple[int, int], size: tuple[int, int]) -> Case:
    boxes = window_boxes(*network, 448, 224)

    def inputs(generator: torch.Generator) -> tuple:
        maps = 3 * torch.randn(len(boxes), 8, 28, 28, device=DEVICE, generator=generator)
        maps = F.avg_pool2d(maps, 5, stride=1, padding=2).softmax(dim=1)  # segments of several patches
        embeddings, image, texts = (
            F.normalize(torch.randn(*shape, 256, device=DEVICE, generator=generator), dim=-1)
            for shape in ((len(boxes), 8), (len(boxes),), (CLASSES,))
        )
        return maps, class_scores(embeddings, image, texts, 30.0), boxes, network, size

    return Case(
        suite="inference",
        op="decode_windows",
        shape=f"{len(boxes)} windows of {network[0]}x{network[1]} to {size[0]}x{size[1]} T={CLASSES}",
        batch=1,
        dtype=torch.float32,
        inputs=inputs,
        implementations={"eager": decode_groupvit_reference, "ours": lambda *inputs: decode(*inputs).labels},
        work={"fwd": Work()},
        modes=("fwd",),
    )


@matrix([whole(*WHOLE), *(sliding(*shapes) for shapes in SLIDING)])
def test_inference(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
