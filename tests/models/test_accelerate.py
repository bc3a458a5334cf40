"""The fast ops inside Hugging Face's GroupViT: the same numbers, and segmentation besides."""

from __future__ import annotations

import copy

import pytest
import torch

import mixreorg_fast
from mixreorg_fast import accelerate
from mixreorg_fast.cli import main
from mixreorg_fast.ops.grouping_attention import grouping_noise

from .huggingface import SMALL, VOCABULARY, random_ids, random_images, random_model, state_equal, transformers


@pytest.fixture
def plain():
    return random_model(SMALL)


@pytest.fixture
def fast(plain):
    return accelerate(copy.deepcopy(plain))


def inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": random_images(3, 64, 64), "input_ids": random_ids(3, 12, VOCABULARY)}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, seed: int = 0):
    """Outputs of a training step, with the gradients left in `model`."""
    torch.manual_seed(seed)
    out = model.train()(**inputs(), return_loss=True, output_attentions=True)
    out.loss.backward()
    return out


def test_outputs_in_evaluation_are_the_same(plain, fast):
    with torch.no_grad():
        expected, out = (m(**inputs(), output_attentions=True, output_segmentation=True) for m in (plain, fast))
    for name in ("image_embeds", "text_embeds", "segmentation_logits", "logits_per_image"):
        torch.testing.assert_close(out[name], expected[name], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(out.vision_model_output.attentions, expected.vision_model_output.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_gradients_in_evaluation_are_the_same(plain, fast):
    for model in (plain, fast):
        model(**inputs(), return_loss=True).loss.backward()
    expected, found = gradients(plain), gradients(fast)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_training_is_the_same_given_the_same_noise(plain, fast, monkeypatch):
    def with_our_noise(logits, tau=1, hard=False, dim=-1):
        noise = grouping_noise(*logits.shape, torch.randint(2**62, ()))
        soft = ((logits + noise) / tau).softmax(dim)
        one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        return one_hot - soft.detach() + soft

    monkeypatch.setattr(transformers.models.groupvit.modeling_groupvit, "gumbel_softmax", with_our_noise)
    expected, out = step(plain), step(fast)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.image_embeds, expected.image_embeds, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(
            gradients(fast)[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_noise_comes_from_torchs_generator(fast):
    first, again, other = (step(fast, seed).image_embeds for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_segment_labels_are_those_of_the_converted_model(plain, fast, tmp_path):
    plain.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    ours = mixreorg_fast.load(tmp_path / "ours")
    images = inputs()["pixel_values"]
    texts = torch.nn.functional.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    for options in ({}, {"size": (50, 90)}, {"background_threshold": 0.05}):
        labels = fast.segment_labels(images, texts, **options)
        expected = ours.segment_labels(images, texts, **options)
        assert labels.shape == (3, *options.get("size", (64, 64)))
        assert (labels == expected).float().mean() > 0.999  # rounding may move a pixel on a border
        assert expected.unique().numel() > 1


def test_weights_and_what_is_saved_stay_as_they_are(plain, fast, tmp_path):
    assert state_equal(fast.state_dict(), plain.state_dict())
    fast.save_pretrained(tmp_path)
    again = transformers.GroupViTModel.from_pretrained(tmp_path)
    assert state_equal(again.state_dict(), plain.state_dict())
    assert again.config.architectures == ["GroupViTModel"]


def test_a_copy_is_independent_and_undoing_restores(fast):
    twin = copy.deepcopy(fast)
    assign = twin.vision_model.encoder.stages[0].downsample.assign
    assert assign.forward.__self__ is assign
    assert accelerate(twin, undo=True) is twin
    assert not hasattr(twin, "segment_labels") and "forward" not in vars(assign)
    assert hasattr(fast, "segment_labels")
    accelerate(twin, undo=True)  # nothing to undo is no error


def test_lower_precision_keeps_its_dtype(fast):
    with torch.no_grad():
        out = fast.to(torch.bfloat16).vision_model(random_images(2, 64, 64).bfloat16(), output_attentions=True)
    assert {out.pooler_output.dtype, *(a.dtype for a in out.attentions)} == {torch.bfloat16}


@pytest.mark.slow
def test_segment_labels_and_a_training_step_compile_whole(fast):
    images = inputs()["pixel_values"]
    texts = torch.nn.functional.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    compiled = torch.compile(fast.segment_labels, fullgraph=True, backend="eager")
    labels = fast.segment_labels(images, texts, background_threshold=0.05)
    assert torch.equal(compiled(images, texts, background_threshold=0.05), labels)

    def pooled(vision):
        torch.manual_seed(3)  # of the noise
        vision(images).pooler_output.square().sum().backward()
        return {name: p.grad.clone() for name, p in vision.named_parameters() if p.grad is not None}

    twin = copy.deepcopy(fast).train()
    expected = pooled(fast.train().vision_model)
    found = pooled(torch.compile(twin.vision_model, fullgraph=True, backend="aot_eager"))
    for (name, gradient), other in zip(expected.items(), found.values(), strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_other_models_are_refused(fast):
    with pytest.raises(TypeError, match="expected transformers' GroupViTModel, got Linear"):
        accelerate(torch.nn.Linear(2, 2))
