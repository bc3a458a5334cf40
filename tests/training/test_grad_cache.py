"""Accumulation that keeps the losses over the whole batch, against one big batch. (With ranks: test_parity.py.)"""

import copy
from dataclasses import replace

import pytest
import torch

from mixreorg_fast.models import MixReorg
from tests.tiny import fill, random_batch, tiny_config

IMAGES, PARTS = 32, 4


def parts_of(batch, count: int) -> list:
    size = len(batch.images) // count
    parts = []
    for start in range(0, len(batch.images), size):
        rows = slice(start, start + size)
        part = replace(batch, images=batch.images[rows], ids=batch.ids[rows], lengths=batch.lengths[rows])
        part.first_image = start
        if batch.noun_ids is not None:
            part.noun_ids, part.noun_lengths = batch.noun_ids[rows], batch.noun_lengths[2 * start : 2 * rows.stop]
        parts.append(part)
    return parts


def saved_bytes(function) -> int:
    """Most bytes that graphs kept for backward at a time while `function` ran, parameters left out."""
    live: dict[int, int] = {}
    most = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal most
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            live[self.key] = tensor.untyped_storage().nbytes()
            most = max(most, sum(live.values()))

        def __del__(self):
            live.pop(self.key, None)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x if isinstance(x, torch.nn.Parameter) else Kept(x), lambda x: getattr(x, "tensor", x)
    ):
        function()
    return most


def step(model, batches: list) -> dict:
    """The gradients of the losses over all of `batches`, left in the parameters; returns the losses."""
    *others, last = batches
    with torch.no_grad():
        cached = [model.features(batch).cached() for batch in others]
    out = model(last, cached)
    out["loss"].backward()
    for batch, features in zip(others, cached, strict=True):
        model(batch, gradients=features.gradients())["loss"].backward()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"drop_path": 0.3}, "loss": {"multi_label": 0.5}},
        {"model": {"method": "groupvit"}},
        {"mixing": {"group_tokens": "learned"}, "loss": {"restored": 0.0}, "train": {"checkpoint_activations": True}},
    ],
    ids=["everything", "groupvit", "no restored"],
)
def test_parts_equal_one_big_batch(changes):
    config = tiny_config(**changes)
    batch = random_batch(config, IMAGES, nouns=2 if config.loss.multi_label else 0)
    whole = MixReorg(config)
    fill(whole)
    cached = copy.deepcopy(whole)
    expected = whole(batch)
    expected["loss"].backward()
    got = step(cached, parts_of(batch, PARTS))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), abs=1e-5), name
    others = dict(cached.named_parameters())
    largest = max(p.grad.abs().max() for p in whole.parameters())
    for name, parameter in whole.named_parameters():
        # A bias in front of a normalisation has no gradient but rounding, hence the floor.
        scale = parameter.grad.abs().max().clamp(min=0.1 * largest)
        assert (others[name].grad - parameter.grad).abs().max() < 1e-5 * scale, name
    for name, buffer in cached.named_buffers():  # one update, with the statistics of all images
        assert torch.allclose(buffer, whole.get_buffer(name), atol=1e-6), name


@pytest.mark.slow
def test_memory_is_that_of_a_part():
    config = tiny_config(model={"image_size": 64})
    batch = random_batch(config, IMAGES)
    model = MixReorg(config)
    whole = saved_bytes(lambda: model(batch)["loss"].backward())
    parts = saved_bytes(lambda: step(model, parts_of(batch, PARTS)))
    assert parts < 0.3 * whole  # a quarter, and what the losses keep
