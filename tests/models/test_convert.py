"""`mixreorg convert`: every format in and out, exactly; files that are not what they seem."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mixreorg_fast
from mixreorg_fast.data.text.tokenizer import Tokenizer

from .conversion import convert, refusal
from .huggingface import SMALL, VOCABULARY, random_images, random_model, state_equal, transformers

CAPTIONS = ["a red striped ball on grass", "two dogs, one cat's bowl", "a plain blue box", "the quick dog again"] * 5


@pytest.fixture(scope="module")
def theirs():
    return random_model(SMALL)


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface") / "theirs"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def our_folder(their_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "ours"
    convert(their_folder, folder)
    return folder


# ---------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hugging_face_to_ours_and_back_is_exact(dtype, tmp_path):
    theirs = random_model(SMALL).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    convert(tmp_path / "theirs", tmp_path / "straight", "--to", "hf")
    assert state_equal(load_file(tmp_path / "back" / "model.safetensors"), theirs.state_dict())
    assert state_equal(load_file(tmp_path / "straight" / "model.safetensors"), theirs.state_dict())
    assert load_file(tmp_path / "ours" / "model.safetensors")["logit_scale"].shape == ()

    back = transformers.GroupViTModel.from_pretrained(tmp_path / "back")
    assert state_equal(back.state_dict(), theirs.state_dict())
    configs = (transformers.GroupViTConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "back"))
    expected, found = ({k: v for k, v in config.items() if k != "transformers_version"} for config in configs)
    assert found == expected


def test_the_temperature_of_the_assignment_goes_into_the_queries(our_folder, tmp_path, capsys):
    model = mixreorg_fast.load(our_folder)
    model.config.tau = 0.25
    model.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "--to", "hf")
    convert(tmp_path / "theirs", tmp_path / "again")
    again = mixreorg_fast.load(tmp_path / "again")
    images = random_images(2, 64, 64)
    assert again.config.tau == 1.0
    assert not torch.allclose(mixreorg_fast.load(our_folder).grouping(images), model.grouping(images), atol=1e-3)
    torch.testing.assert_close(again.grouping(images), model.grouping(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.image_embeddings(images), model.image_embeddings(images), rtol=1e-4, atol=1e-5)
    model.config.hard_assignment = False
    model.save(tmp_path / "soft")
    assert "hard_assignment" in refusal(capsys, tmp_path / "soft", tmp_path / "no", "--to", "hf")


def test_pytorch_bin_is_read_as_safetensors_is(theirs, their_folder, our_folder, tmp_path):
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.json").write_bytes((their_folder / "config.json").read_bytes())
    # Releases up to 4.30 stored this buffer.
    state = theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(state, older / "pytorch_model.bin")
    convert(older, tmp_path / "ours")
    assert state_equal(*(load_file(f / "model.safetensors") for f in (tmp_path / "ours", our_folder)))


def test_ours_as_a_hugging_face_folder_gives_the_same_embeddings(theirs, our_folder, tmp_path):
    model = mixreorg_fast.load(our_folder)
    model.tokenizer = Tokenizer.train(CAPTIONS, 300)
    model.config.text.vocab_size = model.tokenizer.vocab_size
    model.text_encoder.token_embedding = torch.nn.Embedding(model.tokenizer.vocab_size, model.config.text.width)
    model.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "--to", "hf")

    back = transformers.GroupViTModel.from_pretrained(tmp_path / "theirs").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "theirs")
    texts = ["a red Striped ball", "", "two dogs on grass, the quick cat's bowl and more than fits into the context"]
    image = Image.fromarray((random_images(1, 64, 64)[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy())
    wide = image.resize((100, 80))
    inputs = processor(text=texts, images=[image, wide], return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        expected = back(**inputs)

    ids, lengths = model.tokenizer.encode(texts, model.config.text.context)
    assert max(lengths) == model.config.text.context, "one text should be cut"
    for row, length, other in zip(ids, lengths, inputs.input_ids, strict=True):
        assert row[:length].tolist() == other[:length].tolist()
    assert (model.text_embeddings(ids) - expected.text_embeds).abs().max() < 1e-5
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(64, 64, 3).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None]
    assert (inputs.pixel_values[0] - pixels).abs().max() < 1e-5
    assert inputs.pixel_values.shape == (2, 3, 64, 64)
    assert (model.image_embeddings(inputs.pixel_values) - expected.image_embeds).abs().max() < 1e-5

    convert(tmp_path / "theirs", tmp_path / "again")
    again = mixreorg_fast.load(tmp_path / "again")
    assert torch.equal(again.tokenizer.encode(texts, 12)[0], ids)
    assert (again.mean, again.std) == (model.mean, model.std)


def test_clip_tokenizer_of_two_files_gives_clips_ids(tmp_path):
    # In CLIP's order: bytes, bytes at a word's end, merges, the two special tokens.
    letters = list("abcdefghijklmnopqrstuvwxyz,.'!0123456789")
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("'", "s</w>"), ("a", "n")]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    for text in ("A Red  cat's can, no. 42!", "", "re-red"):
        ids, (length,) = ours.encode([text], 77)
        assert ids[0, :length].tolist() == theirs(text).input_ids


# ---------------------------------------------------------------------- ours, and errors


def test_a_run_gives_its_newest_checkpoint(our_folder, tmp_path):
    for step, source in ((9, "old"), (10, "new")):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        model = mixreorg_fast.load(our_folder)
        with torch.no_grad():
            model.logit_scale.fill_(len(source) + step)
        model.save(folder)
    (tmp_path / "run" / "config.json").write_text('{"name": "run", "model": {}}')
    convert(tmp_path / "run", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["logit_scale"] == 13


def edited(folder, target, **changes):
    """A copy of a Hugging Face folder with another config.json; `vision_config` and `text_config` are updated."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "a model of type 'clip'; 'groupvit' was expected"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act is relu, only gelu is supported"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "text_config.layer_norm_eps is 1e-06, only 1e-05"),
        ({"vision_config": {"image_size": [32, 128]}}, "image_size is [32, 128]; a square one was expected"),
        ({"vision_config": {"num_attention_heads": 5}}, "width 96 is not a multiple of heads 5 (nearest: 4 heads)"),
        ({"text_config": {"eos_token_id": 7}}, "eos_token_id is 7, but texts must end with the highest id 59"),
    ],
)
def test_models_that_ours_cannot_be_are_refused(their_folder, tmp_path, capsys, changes, message):
    source = edited(their_folder, tmp_path / "source", **changes)
    assert message in refusal(capsys, source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"], "nothing half-written"


def test_the_older_eos_token_id_means_the_highest_id(their_folder, our_folder, tmp_path):
    convert(edited(their_folder, tmp_path / "source", text_config={"eos_token_id": 2}), tmp_path / "out")
    assert state_equal(*(load_file(f / "model.safetensors") for f in (tmp_path / "out", our_folder)))


NORM = "vision_model.encoder.stages.1.downsample.norm_x.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(NORM), f"lacks tensor '{NORM}' (1 such in all)"),
        (lambda s: s.update(extra=torch.zeros(1)), "has an unknown tensor 'extra' (1 such in all)"),
        (lambda s: s.update({NORM: torch.zeros(7)}), f"'{NORM}' is [7], but its neighbours' sizes make it [96]"),
        (lambda s: s.pop("vision_model.embeddings.position_embeddings"), "lacks tensor 'vision_model.embeddings.pos"),
        (
            lambda s: s.update({"vision_model.embeddings.position_embeddings": torch.zeros(1, 63, 96)}),
            "63 position embeddings are no square grid",
        ),
    ],
    ids=["missing", "unknown", "shape", "no positions", "not square"],
)
def test_tensors_that_do_not_fit_are_named(theirs, their_folder, tmp_path, capsys, change, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((their_folder / "config.json").read_bytes())
    state = theirs.state_dict()
    change(state)
    save_file(state, source / "model.safetensors")
    assert message in refusal(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_and_targets_that_do_not_fit_are_refused(their_folder, tmp_path, capsys):
    out, full, empty = tmp_path / "out", tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    (full / "kept").write_text("kept")
    empty.mkdir()
    assert f"no file or folder {tmp_path / 'nothing'}" in refusal(capsys, tmp_path / "nothing", out)
    assert "holds no model.safetensors" in refusal(capsys, empty, out)
    assert "exists and is not an empty folder" in refusal(capsys, their_folder, full)
    assert "exists and is not an empty folder" in refusal(capsys, their_folder, full / "kept")
    assert "cannot be written" in refusal(capsys, their_folder, full / "kept" / "below")
    assert "not a file of torch.save" in refusal(capsys, full / "kept", out)
    damaged = tmp_path / "damaged.pth"
    torch.save({"model": {"a": torch.zeros(1000)}}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:2000])
    assert "not a readable torch file" in refusal(capsys, damaged, out)
    torch.save({"model": {"a": torch.zeros(3)}}, damaged)
    assert "lacks tensor 'img_encoder.pos_embed'; GroupViT's tensors were expected" in refusal(capsys, damaged, out)
    torch.save([torch.zeros(3)], damaged)
    assert "expected tensors by name" in refusal(capsys, damaged, out)
    lonely = edited(their_folder, tmp_path / "lonely")
    (lonely / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(capsys, lonely, out)
    (lonely / "model.safetensors").write_bytes(b"\0" * 100)
    assert "not a readable safetensors file" in refusal(capsys, lonely, out)
    (lonely / "config.json").write_text("{")
    assert "config.json: line 1: not JSON" in refusal(capsys, lonely, out)
    assert (full / "kept").read_text() == "kept" and not out.exists()
    convert(their_folder, empty)
    assert (empty / "model.json").is_file(), "an empty folder may be filled"


def test_a_tokenizer_can_be_added_and_must_fit(their_folder, our_folder, tmp_path, capsys):
    Tokenizer.train(CAPTIONS, 300).save(tmp_path)
    message = refusal(capsys, their_folder, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json")
    assert "but" in message and f"has embeddings for {VOCABULARY}" in message
    assert "no tokenizer" in refusal(capsys, their_folder, tmp_path / "out", "--tokenizer", tmp_path / "missing")
    assert not (tmp_path / "out").exists()
