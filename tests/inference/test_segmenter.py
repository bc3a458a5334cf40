"""``model.segment``: photos and names of every kind in, a :class:`Segmentation` out."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.inference.model import Model
from mixreorg_fast.models import GroupViT
from tests.evaluation.fakes import draw_photo
from tests.tiny import fill, tiny_config


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = Tokenizer.train(["a photo of a cat and a dog", "a red car on the road"] * 3, 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model
    model = Model(config, tokenizer=tokenizer).eval()
    fill(model)
    return model


@pytest.fixture
def photo(tmp_path) -> Image.Image:
    return draw_photo(tmp_path / "photo.png", (70, 50), seed=0)


def test_the_model_is_a_module_with_the_networks_tensors(model, photo):
    """It pickles, compiles and changes its dtype with its tokenizer and settings."""
    assert model.state_dict().keys() == GroupViT(model.config).state_dict().keys()
    again = pickle.loads(pickle.dumps(model))
    found, expected = again.segment(photo, "cat, dog"), model.segment(photo, "cat, dog")
    assert torch.equal(found.labels, expected.labels) and again.inference == model.inference
    assert again.bfloat16().dtype == torch.bfloat16 and again.segment(photo, "cat, dog").labels.shape == (50, 70)
    images = torch.randn(1, 3, 32, 48)
    compiled = torch.compile(model.segments, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).embeddings, model.segments(images).embeddings)


def test_strings_and_arrays_of_names_and_templates_mean_the_same(model, photo):
    expected = model.segment(photo, ["cat", "red car"], templates=["a {}."])
    for classes in (
        "cat, red car",
        "cat; red  car",
        "cat\nred car\n",
        ("cat", "red car"),
        np.array(["cat", "red car"]),
    ):
        found = model.segment(photo, classes, templates="a {}.")
        assert found.classes == ["cat", "red car"]
        assert torch.equal(found.labels, expected.labels) and found.scores == expected.scores
    assert model.segment(photo, "cat").classes == ["cat"]
    for classes in ("cat, Cat", [], b"cat", ["cat", 3]):
        with pytest.raises(UserError):
            model.segment(photo, classes)
    with pytest.raises(UserError, match="templates: 'a photo' is neither a set of templates"):
        model.segment(photo, "cat", templates="a photo")
    with pytest.raises(UserError, match="unknown key 'shortside' .did you mean 'short_side'"):
        model.segment(photo, "cat", shortside=64)


def test_photos_of_every_kind(model, photo, tmp_path):
    expected = model.segment(photo, "cat, dog, car")
    path, array = tmp_path / "photo.png", np.array(photo)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), array, torch.from_numpy(array)):
        assert torch.equal(model.segment(source, "cat, dog, car").labels, expected.labels)
    with pytest.raises(UserError, match=r"got \[3, 50, 70\]: channels come last"):
        model.segment(array.transpose(2, 0, 1), "cat")


def test_a_batch_of_none_is_refused(model, photo):
    with pytest.raises(UserError, match="batch must be at least 1, got 0"):
        model.segment([photo], "cat, dog", batch=0)


def test_lists_of_photos(model, photo, tmp_path):
    other = draw_photo(tmp_path / "other.png", (40, 60), seed=1)
    for photos in ([tmp_path / "photo.png", other], (photo, str(tmp_path / "other.png"))):
        found = model.segment(photos, "cat, dog, car")
        assert [result.photo.size for result in found] == [(70, 50), (40, 60)]
        for result, single in zip(found, (photo, other), strict=True):
            assert torch.equal(result.labels, model.segment(single, "cat, dog, car").labels)
    assert model.segment([], "cat") == []
    with pytest.raises(UserError, match="no picture .*nothing.png"):
        model.segment([photo, tmp_path / "nothing.png"], "cat")


def test_areas_scores_and_pictures(model, photo, tmp_path):
    found = model.segment(photo, "cat, dog, car", background_threshold=0.4)
    labels = found.labels.numpy()
    assert found.classes == ["background", "cat", "dog", "car"] and found.has_background
    assert found.areas == {name: (labels == t).mean() for t, name in enumerate(found.classes)}
    # A class's score is that of its best segment in the picture, which then wears the class of the highest score.
    assert list(found.scores) == ["cat", "dog", "car"] and all(0 <= score <= 1 for score in found.scores.values())
    without = model.segment(photo, "cat, dog, car")
    assert without.scores == found.scores and without.areas[max(without.scores, key=without.scores.get)] > 0

    picture = found.overlay()
    assert picture.width >= photo.width and picture.height > photo.height
    found.save(tmp_path / "out" / "a.png")
    found.save(tmp_path / "out" / "a.jpg")
    assert (np.asarray(Image.open(tmp_path / "out" / "a.png")) == np.asarray(picture)).all()
    assert Image.open(tmp_path / "out" / "a.jpg").format == "JPEG"
    found.save_mask(tmp_path / "out" / "mask.png")
    assert (np.asarray(Image.open(tmp_path / "out" / "mask.png")) == labels).all()
    with pytest.raises(UserError, match="no picture can be written with the suffix '.txt'"):
        found.save(tmp_path / "a.txt")
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.labels, found.labels) and again.scores == found.scores


def test_a_threshold_of_0_is_no_background(model, photo):
    carrying = Model(model.config, tokenizer=model.tokenizer).eval()
    carrying.load_state_dict(model.state_dict())
    carrying.inference = model.inference.with_options(background_threshold=0.5)
    assert carrying.segment(photo, "cat, dog").classes == ["background", "cat", "dog"]
    found = carrying.segment(photo, "cat, dog", background_threshold=0)
    assert found.classes == ["cat", "dog"] and not found.has_background
    assert torch.equal(found.labels, model.segment(photo, "cat, dog").labels)
    for name in ("background", "Background"):
        with pytest.raises(UserError, match="'background' is what scores below the background threshold .0.5."):
            carrying.segment(photo, ["cat", name])
    assert carrying.segment(photo, ["cat", "background"], background_threshold=0).classes == ["cat", "background"]


def test_through_windows(model, photo):
    """Labels and areas come from the windows, the stages' maps from the whole photo."""
    options = {"mode": "sliding", "window": 32, "stride": 16, "short_side": 64}
    found, whole = (
        model.segment(photo, "cat, dog, car", **options),
        model.segment(photo, "cat, dog, car", short_side=64),
    )
    assert found.segments.max() >= model.config.groups[1]
    assert all(torch.equal(a, b) for a, b in zip(found.stages, whole.stages, strict=True))
    assert sum(found.areas.values()) == pytest.approx(1)
