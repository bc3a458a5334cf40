"""Folders of weights: what goes in comes out, and what does not fit is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mixreorg_fast
from mixreorg_fast.config import InferenceConfig, parse_config
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.inference.model import Model
from mixreorg_fast.inference.windows import segment_of_pixels
from mixreorg_fast.models import GroupViT, weights
from mixreorg_fast.models.image_encoder import resize_positions
from tests.tiny import fill, tiny_config

POSITIONS = "image_encoder.positions.weight"


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(tiny_config().model, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "weights")
    return tmp_path / "weights"


def rewrite(folder, change) -> None:
    state = load_file(folder / weights.WEIGHTS)
    change(state)
    save_file(state, folder / weights.WEIGHTS)


def test_what_is_saved_is_loaded(model, tmp_path):
    captions = ["a cat on grass", "a dog on sand"]
    model.tokenizer = Tokenizer.train(captions, 280)
    model.save(tmp_path / "weights")
    again = mixreorg_fast.load(tmp_path / "weights")
    assert not again.training
    assert again.config == model.config
    assert (again.mean, again.std) == (model.mean, model.std)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.tokenizer.encode(captions, 12)[0], model.tokenizer.encode(captions, 12)[0])
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(again.image_embeddings(images), model.image_embeddings(images))
    assert torch.equal(again.grouping(images), model.grouping(images))


def test_loading_draws_no_values(folder, monkeypatch):
    """Neither initial values, which the file replaces, nor numbers of a user's random state."""
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *_, **__: pytest.fail("a draw"))
    mixreorg_fast.load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_temperature_is_a_number_in_the_file(model, folder):
    assert load_file(folder / weights.WEIGHTS)["logit_scale"].shape == ()
    assert mixreorg_fast.load(folder).logit_scale.shape == (1,)


def test_parameters_that_live_elsewhere_can_be_saved(model, tmp_path):
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save(tmp_path / "weights", state)
    assert torch.equal(mixreorg_fast.load(tmp_path / "weights").logit_scale, model.logit_scale + 1)


def test_a_run_stands_for_its_newest_weights(model, tmp_path):
    for step in (8, 16):
        torch.nn.init.constant_(model.logit_scale, step / 8)
        model.save(tmp_path / "checkpoints" / f"step_{step:08d}")
    assert mixreorg_fast.load(tmp_path).logit_scale == 2


def test_positions_are_interpolated_between_image_sizes(model, folder):
    larger = parse_config({"model": model.config.model_dump(mode="json") | {"image_size": 48}}).model
    other = GroupViT(larger)
    weights.fill(other, load_file(folder / weights.WEIGHTS), folder)
    positions = model.image_encoder.positions.weight
    assert other.image_encoder.positions.weight.shape == (1, 36, 24)
    assert torch.equal(other.image_encoder.positions.weight, resize_positions(positions, 6, 6))
    # As on the fly: the model of either size sees a larger image alike.
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(other.eval().image_embeddings(images), model.image_embeddings(images))


def test_resized_positions_keep_their_places():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    grid = torch.stack([rows, columns], -1).reshape(1, 36, 2)
    resized = resize_positions(grid, 12, 6).reshape(12, 6, 2)
    assert (resized[2:-2, :, 0].diff(dim=0) > 0).all() and resized[..., 0].diff(dim=1).abs().max() < 1e-5
    torch.testing.assert_close(resize_positions(grid, 6, 6), grid)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / weights.WEIGHTS).write_bytes(b"\0" * 99), "not a readable safetensors file"),
        (lambda f: (f / weights.WEIGHTS).write_bytes((f / weights.WEIGHTS).read_bytes()[:-9]), "not a readable"),
        (lambda f: (f / weights.WEIGHTS).unlink(), "holds no model.safetensors"),
        (lambda f: (f / weights.DESCRIPTION).unlink(), "no model.json that says the model's sizes"),
        (lambda f: (f / weights.DESCRIPTION).write_text("{"), "not JSON"),
        (lambda f: (f / weights.DESCRIPTION).write_text("[]"), "expected a JSON object"),
        (
            lambda f: (f / weights.DESCRIPTION).write_text('{"format": "other/1"}'),
            "format: 'other/1' is not a valid",
        ),
        (lambda f: rewrite(f, lambda s: s.pop(POSITIONS)), f"lacks tensor '{POSITIONS}' (1 such in all)"),
        (lambda f: rewrite(f, lambda s: s.update(new=torch.zeros(1))), "has an unknown tensor 'new' (1 such in all)"),
        (
            lambda f: rewrite(f, lambda s: s.update({"text_encoder.norm.bias": torch.zeros(3)})),
            "'text_encoder.norm.bias' is [3], the model needs [16]",
        ),
        (
            lambda f: rewrite(f, lambda s: s.update({POSITIONS: torch.zeros(1, 7, 24)})),
            f"'{POSITIONS}' is [1, 7, 24]",
        ),
        (lambda f: rewrite(f, lambda s: s.update({POSITIONS: torch.zeros(7)})), f"'{POSITIONS}' is [7]"),
        (lambda f: rewrite(f, lambda s: s.update(logit_scale=torch.zeros(2))), "'logit_scale' is [2]"),
        (lambda f: (f / weights.TOKENIZER).write_text("{}"), "not a tokenizer.json"),
    ],
)
def test_what_does_not_fit_is_named(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError) as error:
        mixreorg_fast.load(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 25}, "width 25 is not a multiple of heads 2"),
        ({"widht": 24}, "unknown key 'model.widht' (did you mean 'width'?)"),
        ({"groups": [6, "3"]}, "groups"),
    ],
)
def test_sizes_that_make_no_model_are_named(folder, change, message):
    description = json.loads((folder / weights.DESCRIPTION).read_text())
    description["model"] |= change
    (folder / weights.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(UserError) as error:
        mixreorg_fast.load(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_inference_settings_are_saved_and_older_weights_go_without(model, folder, tmp_path):
    assert mixreorg_fast.load(folder).inference == InferenceConfig(short_side=64)  # twice the training size
    path = folder / weights.DESCRIPTION
    description = json.loads(path.read_text())
    assert description["inference"]["short_side"] == 64 and description["format"] == "mixreorg_fast/1"
    older = {key: value for key, value in description.items() if key != "inference"}
    path.write_text(json.dumps(older))
    assert mixreorg_fast.load(folder).inference == InferenceConfig(short_side=64)
    for change, message in (
        ({"short_side": "64"}, "inference.short_side: input should be a valid integer"),
        ({"shortside": 64}, "unknown key 'inference.shortside' (did you mean 'short_side'?)"),
        (None, "inference: input should be an object, got null"),
        ({"templates": ["a photo"]}, "inference.templates: template 'a photo' has no {}"),
    ):
        path.write_text(json.dumps(older | {"inference": change}))
        with pytest.raises(UserError) as error:
            mixreorg_fast.load(folder)
        assert f"{path}: {message}" in str(error.value)


def test_a_run_gives_its_weights_the_threshold_that_its_datasets_share():
    def threshold(*of_datasets, **evaluation):
        entries = [{"name": str(i), "root": "x", "background_threshold": t} for i, t in enumerate(of_datasets)]
        return tiny_config(eval={"datasets": entries, **evaluation}).inference.background_threshold

    assert (threshold(), threshold(None), threshold(0.3, 0.3), threshold(0.3, None), threshold(0.3, 0.4)) == (
        None, None, 0.3, None, None,
    )  # fmt: skip
    assert threshold(None, background_threshold=0.2) == threshold(0.2, background_threshold=0.9) == 0.2
    assert threshold(background_threshold=0.2) == threshold(0.2, None, background_threshold=0.2) == 0.2
    assert threshold(0.3, 0.4, background_threshold=0.2) is None


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no file or folder .*nothing"):
        mixreorg_fast.load(tmp_path / "nothing")


def test_a_failed_write_leaves_what_was_there(model, folder):
    before = (folder / weights.WEIGHTS).read_bytes()
    with pytest.raises(KeyError):
        model.save(folder, {"no temperature": torch.zeros(1)})
    model.mean = object()
    with pytest.raises(TypeError):
        model.save(folder)
    assert (folder / weights.WEIGHTS).read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_photo_is_segmented_by_class_names(tmp_path):
    """`load(DIR).segment(...)`: labels at the photo's own size, the same through the tensor interface."""
    tokenizer = Tokenizer.train(["a photo of a cat", "a photo of a dog", "grass"], 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model
    model = Model(config, tokenizer=tokenizer).eval()
    fill(model)
    model.save(tmp_path / "weights")
    model = mixreorg_fast.load(tmp_path / "weights")
    photo = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    result = model.segment(photo, ["cat", "dog", "grass"])
    assert result.labels.shape == result.segments.shape == (50, 70)
    assert result.classes == ["cat", "dog", "grass"] and result.labels.max() < 3
    assert result.segments.max() < config.groups[1]
    # Both stages' maps are given, and the last are those of the segments.
    assert [tuple(maps.shape[:1]) for maps in result.stages] == [(6,), (3,)]
    assert all(torch.allclose(maps.sum(0), torch.ones(())) for maps in result.stages)
    assert torch.equal(segment_of_pixels(result.stages[-1][None], (50, 70))[0], result.segments)
    # One class to a segment.
    assert all(len(result.labels[result.segments == s].unique()) == 1 for s in result.segments.unique())
    with_background = model.segment(photo, ["cat", "dog"], background_threshold=0.9)
    assert with_background.classes == ["background", "cat", "dog"] and with_background.labels.max() > 0
    model.tokenizer = None
    with pytest.raises(UserError, match="tokenizer"):
        model.segment(photo, ["cat"])
