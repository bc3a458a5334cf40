"""Our backbone against Hugging Face's implementation, on random weights that went through `mixreorg convert`."""

from __future__ import annotations

import copy

import pytest
import torch

import mixreorg_fast
from mixreorg_fast.cli import main
from mixreorg_fast.models import GroupViT
from mixreorg_fast.models.image_encoder import resize_positions
from tests.tiny import tiny_config

from .huggingface import SMALL, VOCABULARY, build, random_ids, random_images, random_model

POSITIONS = "vision_model.embeddings.position_embeddings"


@pytest.fixture(scope="module", params=["small", pytest.param("official", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """The same random weights in both implementations, with the configuration and the size of the vocabulary."""
    config, vocabulary = (SMALL, VOCABULARY) if request.param == "small" else ({}, 49408)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = random_model(config)
    theirs.save_pretrained(folder / "theirs")
    assert main(["convert", str(folder / "theirs"), str(folder / "ours")]) == 0
    return theirs, mixreorg_fast.load(folder / "ours"), config, vocabulary


def at_resolution(model, config: dict, height: int, width: int):
    """`model` for another resolution: Hugging Face's takes only its configuration's, so a second one is built."""
    embeddings = model.vision_model.embeddings
    if tuple(embeddings.patch_embeddings.image_size) == (height, width):
        return model
    vision = {**config.get("vision_config", {}), "image_size": [height, width]}
    patch = embeddings.patch_size
    second = build({**config, "vision_config": vision})
    state = model.state_dict()
    state[POSITIONS] = resize_positions(state[POSITIONS], height // patch, width // patch)
    second.load_state_dict(state)
    return second


@pytest.mark.parametrize(("size", "seed"), [((224, 224), 0), ((448, 448), 0), ((448, 592), 2)])
def test_embeddings_and_maps_are_hugging_faces(pair, size, seed):
    theirs, ours, config, vocabulary = pair
    # The small model's native resolution stands for 224; the larger ones keep their proportions to it.
    height, width = size if not config else (size[0] * 64 // 224, size[1] * 64 // 224 // 8 * 8)
    images = random_images(2, height, width, seed)
    ids = random_ids(3, ours.config.text.context, vocabulary)
    with torch.no_grad():
        expected = at_resolution(theirs, config, height, width)(
            pixel_values=images, input_ids=ids, output_attentions=True
        )
    first, second = expected.vision_model_output.attentions
    for assignment in (first, second):
        # The aggregation is hard: a near-tie could fall differently and say nothing about the rest.
        best, runner_up = assignment.topk(2, dim=1).values.unbind(1)
        assert (best - runner_up).min() > 1e-5
        assert assignment.argmax(1).unique().numel() >= 3, "assignments that all agree would prove little"
    maps = (second @ first).unflatten(2, (height // ours.config.patch_size, -1))

    for name, value, reference in (
        ("image", ours.image_embeddings(images), expected.image_embeds),
        ("text", ours.text_embeddings(ids), expected.text_embeds),
        ("maps", ours.grouping(images), maps),
    ):
        deviation = (value - reference).abs().max().item()
        print(f"{name} {height}x{width}: {deviation:.1e}")
        assert value.shape == reference.shape
        assert deviation < 1e-4, name
    spread = (expected.image_embeds[0] - expected.image_embeds[1]).abs().max()
    assert spread > 100 * 1e-4, "inputs that look alike would prove little"


def test_interpolated_positions_are_hugging_faces_own_interpolation(pair):
    theirs, ours, config, _ = pair
    embeddings = theirs.vision_model.embeddings
    height, width = (448, 592) if not config else (128, 168)
    with torch.no_grad():
        images = random_images(1, height, width)
        expected = embeddings(images, interpolate_pos_encoding=True)
        assert (ours.image_encoder.embed(images, torch.float32) - expected).abs().max() < 1e-5


def test_sizes_that_do_not_split_into_patches_are_refused(pair):
    _, ours, config, _ = pair
    with pytest.raises(ValueError, match="do not split into patches"):
        ours.image_embeddings(torch.zeros(1, 3, 100, 101))
    with pytest.raises(ValueError, match="longer than the context"):
        ours.text_embeddings(torch.zeros(1, ours.config.text.context + 1, dtype=torch.int64))


def test_half_precision_errs_no_more_than_hugging_faces(pair):
    theirs, ours, config, vocabulary = pair
    if not config:
        pytest.skip("said of the small one")
    images, ids = random_images(16, 64, 64), random_ids(16, ours.config.text.context, vocabulary)
    with torch.no_grad():
        exact, baseline = (
            copy.deepcopy(theirs).to(dtype)(pixel_values=images.to(dtype), input_ids=ids)
            for dtype in (torch.float64, torch.bfloat16)
        )
    half = copy.deepcopy(ours).bfloat16()
    for out, name in ((half.image_embeddings(images), "image_embeds"), (half.text_embeddings(ids), "text_embeds")):
        assert out.dtype == torch.float32
        # Over all images: a patch whose groups nearly tie may fall differently in either.
        error, theirs = ((x.double() - exact[name]).square().mean().sqrt() for x in (out, baseline[name]))
        assert error <= 1.2 * theirs, name


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_initial_scale_of_the_image_encoder(std):
    config = tiny_config(model={"init_std": std, "text": {"vocab_size": VOCABULARY}}).model
    linears = (module for module in GroupViT(config).image_encoder.modules() if isinstance(module, torch.nn.Linear))
    weights = torch.cat([linear.weight.flatten() for linear in linears])
    assert weights.std().item() == pytest.approx(std, rel=0.03)
