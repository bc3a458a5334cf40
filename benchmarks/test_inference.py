"""Zero-shot segmentation by 150 classes: whole photos through the network, and the decoding of sliding windows.

``segment_labels`` is given the classes' embeddings, as over a dataset; "segment_labels and prompts" their token ids,
and encodes them in every call, as ``GroupViTModel(input_ids, pixel_values)`` does. All implementations get the same
inputs and do the same work, with the same weights and dtype ("huggingface, fp32" excepted).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mixreorg_fast import accelerate, ops
from mixreorg_fast.config import ModelConfig, TextConfig
from mixreorg_fast.convert import save_huggingface
from mixreorg_fast.evaluation.classes import ADE20K
from mixreorg_fast.inference.model import Model
from mixreorg_fast.inference.windows import decode, window_boxes
from mixreorg_fast.models.groupvit import class_scores
from tests.inference.dense import decode_groupvit_reference

from .harness import CPU_BF16, DEVICE, ON_GPU, Case, Work, matrix
from .test_decode_segments import dense

CLASSES, VOCABULARY = 150, 49408
# GroupViT's full size. Batch, the network's input, the photo.
WHOLE = [(32, 448, (512, 683))] if ON_GPU else [(1, 224, (256, 341)), (8, 224, (256, 341))]
DTYPES = [torch.float32, *([torch.bfloat16] if ON_GPU or CPU_BF16 else [])]
# The network's input, cut into windows of 448 px every 224 px, and the photo: ADE20K's usual and largest ones.
SLIDING = [((448, 592), (512, 683)), *([((448, 640), (2100, 3000))] if ON_GPU else [])]


@cache
def our_model(side: int, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    config = ModelConfig(image_size=side, text=TextConfig(vocab_size=VOCABULARY))
    return Model(config).to(DEVICE, dtype).eval()


@cache
def their_model(side: int, dtype: torch.dtype):
    """The same weights in Hugging Face's implementation."""
    transformers = pytest.importorskip("transformers", reason="needs the Hugging Face extra")
    ours = our_model(side, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        state = ours.state_dict()
        save_huggingface(ours, folder, state | {"logit_scale": state["logit_scale"].reshape(())})
        return transformers.GroupViTModel.from_pretrained(folder).to(DEVICE, dtype).eval()


@cache
def accelerated_model(side: int, dtype: torch.dtype):
    return accelerate(copy.deepcopy(their_model(side, dtype)))


@cache
def compiled_segments(side: int, dtype: torch.dtype, mode: str):
    """Our network under torch.compile; "reduce-overhead" is CUDA graphs."""
    return torch.compile(our_model(side, dtype).segments, mode=mode)


@torch.no_grad()
def eager(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Our network with PyTorch's linear layers, and a decoding that holds the scores of every class at every pixel."""
    model = our_model(images.shape[2], dtype)
    with mock.patch.object(ops, "linear", F.linear):
        seen = model.segments(images)
    scores = class_scores(seen.embeddings, seen.image, texts, model.logit_multiplier())
    return dense(seen.maps, scores, size)


def ours(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    model = our_model(images.shape[2], dtype)
    return model.segment_labels(images, embedded(texts, model.text_embeddings), size=size)


@torch.no_grad()
def ours_compiled(
    images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, mode: str
) -> torch.Tensor:
    seen = compiled_segments(images.shape[2], dtype, mode)(images)
    scores = class_scores(seen.embeddings, seen.image, texts, our_model(images.shape[2], dtype).logit_multiplier())
    return ops.decode_segments(seen.maps, scores, size)


@torch.no_grad()
def huggingface(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Hugging Face's network, and the same dense decoding."""
    model = their_model(images.shape[2], dtype)
    vision = model.vision_model(images.to(dtype), output_attentions=True)
    first, second = vision.attentions
    segments, side = vision.last_hidden_state, images.shape[2] // 16
    embeddings = F.normalize(model.visual_projection(segments.flatten(0, 1)), dim=-1).unflatten(0, segments.shape[:2])
    image = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    texts = embedded(texts, partial(their_texts, model))
    scores = class_scores(embeddings, image, texts, model.logit_scale.exp().clamp(max=100.0))
    return dense((second @ first).float().unflatten(2, (side, side)), scores, size)


def their_texts(model, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of prompts that are padded to the longest, as transformers' own processor pads them."""
    mask = (torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)).long()
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def accelerated(images: torch.Tensor, texts: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Hugging Face's network with the fast ops put in."""
    return accelerated_model(images.shape[2], dtype).segment_labels(images.to(dtype), texts, size=size)


def embedded(texts: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`texts`, encoded where they are token ids."""
    return texts if texts.is_floating_point() else encode(texts)


def prompts(generator: torch.Generator) -> torch.Tensor:
    """Token ids of "a photo of a NAME." for the classes of ADE20K, a token for each word, padded to the longest."""
    lengths = torch.tensor([7 + len(name.split()) for name in ADE20K], device=DEVICE)[:, None]
    place = torch.arange(int(lengths.max()), device=DEVICE)
    ids = torch.randint(1, VOCABULARY - 1, (CLASSES, len(place)), device=DEVICE, generator=generator)
    return ids.where(place != lengths - 1, VOCABULARY - 1).where(place < lengths, 0)


def whole(batch: int, side: int, size: tuple[int, int], dtype: torch.dtype, encoding: bool = False) -> Case:
    def inputs(generator: torch.Generator) -> tuple:
        images = torch.randn(batch, 3, side, side, device=DEVICE, generator=generator)
        if encoding:
            return images, prompts(generator), size
        texts = torch.randn(CLASSES, 256, device=DEVICE, generator=generator)
        return images, F.normalize(texts, dim=-1), size

    functions = {"ours": ours, "huggingface": huggingface}
    if not encoding:
        functions |= {"eager": eager, "accelerated": accelerated}
    if not encoding and ON_GPU:
        functions["ours compiled"] = partial(ours_compiled, mode="default")
        functions["ours in CUDA graphs"] = partial(ours_compiled, mode="reduce-overhead")
    implementations = {name: partial(function, dtype=dtype) for name, function in functions.items()}
    if ON_GPU and dtype != torch.float32:
        implementations["huggingface, fp32"] = partial(huggingface, dtype=torch.float32)
    return Case(
        suite="inference",
        op="segment_labels and prompts" if encoding else "segment_labels",
        shape=f"{batch}x3x{side}x{side} to {size[0]}x{size[1]} T={CLASSES}",
        batch=batch,
        dtype=dtype,
        inputs=inputs,
        implementations=implementations,
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


@matrix(
    [
        *(whole(*shape, dtype, encoding) for encoding in (False, True) for shape in WHOLE for dtype in DTYPES),
        *(sliding(*shapes) for shapes in SLIDING),
    ]
)
def test_inference(measure, case, implementation, mode, graph):
    measure(case, implementation, mode, graph)
