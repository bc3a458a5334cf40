"""The method: what is mixed, what is learned from it, and that none of it is left at test time."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixreorg_fast import ops
from mixreorg_fast.models import GroupViT, MixReorg
from tests.tiny import fill, random_batch, tiny_config


def module(**changes) -> MixReorg:
    model = MixReorg(tiny_config(**changes))
    fill(model)
    return model


def test_patches_that_carry_their_image_show_the_labels_and_come_back():
    images, patches, group = 12, 49, 4
    index = torch.arange(images)[:, None, None].expand(images, patches, 1).float()
    plan = ops.MixPlan.sample(images, patches, group, seed=3)
    mixed = ops.patch_mix(index, plan)
    # The number found in a mixed patch is the image it came from, and its label that image's place in the group.
    assert torch.equal(mixed[..., 0].long() % group, plan.labels)
    assert torch.equal(mixed[..., 0].int(), plan.source)
    assert torch.equal(mixed[..., 0] // group, index[..., 0] // group)  # never leaves its group
    # Used exactly once: at each position the group's numbers are all there.
    assert torch.equal(mixed.view(-1, group, patches).sort(dim=1).values, index.view(-1, group, patches))
    assert torch.equal(ops.patch_restore(mixed, plan), index)


def test_every_loss_and_their_sum():
    model = module(loss={"restored": 0.7, "mixed": 0.3, "multi_label": 0.2})
    out = model(random_batch(model.config, 8, nouns=2))
    total = out["loss_original"] + 0.7 * out["loss_restored"] + 0.3 * out["loss_mixed"] + 0.2 * out["loss_multi_label"]
    torch.testing.assert_close(out["loss"], total)
    assert all(value.dim() == 0 and value.dtype == torch.float32 for value in out.values())
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_baseline_is_the_original_branch_alone():
    mixing, baseline = module(), module(model={"method": "groupvit"})
    baseline.load_state_dict(mixing.state_dict())
    batch = random_batch(mixing.config, 8)
    out = baseline(batch)
    assert "loss_mixed" not in out and "loss_restored" not in out
    # Its noise and batch statistics are those of the original branch within the full method.
    torch.testing.assert_close(out["loss_original"], mixing(batch)["loss_original"])
    torch.testing.assert_close(out["loss"], out["loss_original"])


@pytest.mark.parametrize("absent", ["mixed", "restored"])
def test_a_branch_without_a_loss_costs_nothing_and_changes_nothing(absent):
    """Leaving a branch out gives what a weight of nearly nothing gives."""
    whole, without = module(loss={absent: 1e-12}), module(loss={absent: 0.0})
    batch = random_batch(whole.config, 8)
    tokens = without._first_stage(batch, without._plan(batch))
    assert len(tokens) == 2 * 8
    of_whole, of_part = whole(batch), without(batch)
    assert f"loss_{absent}" not in of_part
    torch.testing.assert_close(of_part["loss"], of_whole["loss"])
    of_whole["loss"].backward()
    of_part["loss"].backward()
    for (_, expected), got in zip(whole.named_parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hard", [True, False])
def test_maps_are_asked_for_where_they_are_read(hard, monkeypatch):
    """Of the mixed branch alone; what is measured of the original's use of segments is what its maps would say."""
    model = module(model={"hard_assignment": hard})
    asked, maps = [], []
    grouping_attention = ops.grouping_attention

    def recording(*args, return_assignment, **settings):
        asked.append(return_assignment)
        if return_assignment == "winner":
            maps.append(grouping_attention(*args, return_assignment="used", **settings)[1])
        return grouping_attention(*args, return_assignment=return_assignment, **settings)

    monkeypatch.setattr(ops, "grouping_attention", recording)
    out = model(random_batch(model.config, 8))
    assert asked == ["winner", "used", "none"] * 2
    first, second = maps
    owner = second.argmax(1).gather(1, first.argmax(1))
    shares = torch.nn.functional.one_hot(owner, second.shape[1]).float().mean(1)
    assert torch.equal(out["groups_used"], (shares > 0).sum(1).float().mean())
    assert torch.equal(out["group_entropy"], torch.special.entr(shares).sum(1).mean())
    assert out["groups_used"] > 1


def test_schedules_run_to_the_settings_of_evaluation():
    schedule = {"share": 0.5, "tau_start": 4.0, "noise_end": 0.0, "soft_start": True, "mixed_start": 0.0}
    model = module(model={"tau": 0.25}, schedule=schedule)
    batch = random_batch(model.config, 8)
    at = lambda done: model._assignment(replace(batch, done=done))  # noqa: E731
    assert at(0.0) == (False, 1.0, 4.0)
    assert at(0.25) == (False, 0.5, 1.0)  # half way: the temperature falls geometrically, the noise linearly
    assert at(0.5) == at(1.0) == (True, 0.0, 0.25)
    losses = [model(replace(batch, done=done)) for done in (0.0, 0.5)]
    for out, weight in zip(losses, (0.0, 1.0), strict=True):
        expected = out["loss_original"] + out["loss_restored"] + weight * out["loss_mixed"]
        torch.testing.assert_close(out["loss"], expected)
    # Evaluation knows no schedule.
    assert model.eval()._assignment(replace(batch, done=0.0)) == (True, 0.0, 0.25)


def test_restoration_without_blending_or_blocks_between_returns_the_original():
    """With identity blocks after mixing, restored patches are the originals, bit for bit."""
    model = module(mixing={"blend": 0.0})
    for block in model.backbone.image_encoder.stages[0].blocks[1:]:
        block.forward = lambda x, keep: x
    batch = random_batch(model.config, 8)
    tokens = model._first_stage(batch, model._plan(batch))
    original, mixed, restored = tokens.chunk(3)
    patches = model.config.model.patches
    assert torch.equal(restored[:, :patches], original[:, :patches])
    assert not torch.equal(mixed[:, :patches], original[:, :patches])


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_branches_are_made_in_single_launches(monkeypatch, device):
    """No slice or concatenation around mixing, blending and restoring, and one draw for all of stochastic depth."""
    monkeypatch.setattr("mixreorg_fast.ops.dispatch._on_gpu", lambda tensor: True, raising=False)
    model = module(model={"drop_path": 0.5, "depths": [3, 1, 1]}, mixing={"context_blocks": 1}).to(device)
    for block in model.backbone.image_encoder.stages[0].blocks:
        block.forward = lambda x, keep: x
    batch = random_batch(model.config, 8)
    batch.images, batch.ids = batch.images.to(device), batch.ids.to(device)
    plan = model._plan(batch)
    model._first_stage(batch, plan, model._drops(batch))  # backward is tried at the first call
    with Recorded() as drawing:
        drops = model._drops(batch)
    with Recorded() as forward:
        tokens = model._first_stage(batch, plan, drops)
    with Recorded() as backward:
        tokens.backward(torch.ones_like(tokens))
    assert len(drawing.names) <= 3, drawing.names  # the seed, the draw
    assert forward.names.count("aten.cat.default") == 1  # group tokens beside the patches, at the start
    for names, step in ((forward.names, ""), (backward.names, "_backward")):
        assert [name.split(".")[1] for name in names if name.startswith("mixreorg.")] == (
            [f"append_branch{step}", "blend_tokens", f"append_branch{step}"]
        )
    assert backward.names.count("aten.slice_backward.default") == 0


@pytest.mark.parametrize("method", ["mixreorg", "groupvit"])
def test_nothing_of_training_reaches_evaluation(method):
    """At test time an image's result depends on neither its neighbours, the seed, nor the mixing's settings."""
    model = module(model={"method": method}).eval()
    batch = random_batch(model.config, 8)
    together = model.backbone.segments(batch.images)
    for image in range(8):
        alone = model.backbone.segments(batch.images[image : image + 1])
        torch.testing.assert_close(alone.maps[0], together.maps[image])
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[image])
    torch.manual_seed(1)
    again = model.backbone.segments(batch.images)
    assert torch.equal(again.maps, together.maps) and torch.equal(again.embeddings, together.embeddings)


def test_the_forward_of_the_backbone_is_its_evaluation():
    """Both embeddings and the logit scale; gradients reach every parameter; the image encoder exports."""
    model = module().backbone.eval()
    batch = random_batch(tiny_config(), 4)
    images, texts, scale = model(batch.images, batch.ids)
    assert torch.equal(images, model.image_embeddings(batch.images)) and texts.dtype == torch.float32
    assert torch.equal(texts, model.text_embeddings(batch.ids)) and torch.equal(scale, model.logit_multiplier())
    ops.contrastive_loss(images, texts, scale).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    exported = torch.export.export(model.image_encoder, (batch.images,)).module()
    torch.testing.assert_close(exported(batch.images), model.image_encoder(batch.images))


def test_shapes_and_weights_at_test_time_are_the_backbones():
    learned = module(mixing={"group_tokens": "learned"})
    baseline = GroupViT(learned.config.model)
    assert {k: v.shape for k, v in learned.backbone.state_dict().items()} == {
        k: v.shape for k, v in baseline.state_dict().items()
    }
    learned(random_batch(learned.config, 8))["loss"].backward()
    assert all(tokens.weight.grad is not None for tokens in learned.branch_tokens)


def test_randomness_is_a_function_of_seed_and_image_index():
    model = module(model={"drop_path": 0.5})
    batch = random_batch(model.config, 8)
    first = model(batch)
    assert torch.equal(first["loss"], model(batch)["loss"])
    assert torch.equal(first["loss"], model(replace(batch, seed=torch.tensor(batch.seed)))["loss"])
    assert not torch.equal(first["loss"], model(replace(batch, seed=batch.seed + 1))["loss"])
    assert not torch.equal(first["loss"], model(replace(batch, first_image=8))["loss"])


def test_batch_statistics_come_from_the_pooled_originals():
    """Restored and mixed rows are normalised with them and leave no trace in the running averages."""
    mixing, baseline = module(), module(model={"method": "groupvit"})
    batch = random_batch(mixing.config, 8)
    mixing(batch)
    baseline(batch)
    for name, value in baseline.named_buffers():
        torch.testing.assert_close(mixing.get_buffer(name), value)
    assert mixing.backbone.image_projection.norm.num_batches_tracked == 1


def test_recomputed_activations_change_nothing():
    plain = module(model={"drop_path": 0.3})
    recomputing = module(model={"drop_path": 0.3}, train={"checkpoint_activations": True})
    batch = random_batch(plain.config, 8)
    for model in (plain, recomputing):
        model(batch)["loss"].backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), recomputing.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(plain.buffers(), recomputing.buffers(), strict=True):
        assert torch.equal(a, b)


def test_bf16_is_near_fp32():
    exact, half = module(), module(train={"precision": "bf16"})
    batch = random_batch(exact.config, 8)
    a, b = exact(batch), half(batch)
    assert abs(a["loss"] - b["loss"]) < 0.05 * a["loss"]


@pytest.mark.slow
def test_a_tiny_batch_is_overfitted():
    """Mixed-patch accuracy above 95 %, both contrastive losses near zero."""
    torch.manual_seed(1)  # from some other starts the mixed images stay confused with one another
    model = MixReorg(
        tiny_config(
            model={"width": 48, "depths": [3, 1, 1], "groups": [8, 4], "gumbel": False, "hard_assignment": False},
            mixing={"blend": 0.2},
        )
    )
    batch = random_batch(model.config, 4)
    # An image's patches share a look of their own, as those of a photo do.
    batch.images = 0.3 * batch.images + torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        out = model(replace(batch, seed=step))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        done = out["mixed_accuracy"] > 0.98 and max(out["loss_original"], out["loss_restored"]) < 0.02
        if done:
            break
    assert out["mixed_accuracy"] > 0.95, out
    assert out["loss_original"] < 0.05 and out["loss_restored"] < 0.05, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_captions_are_the_padded_ones(dtype):
    """Features and every gradient, whichever way the ends are known; in bf16 within what its padded form errs."""
    config = tiny_config()
    encoder = MixReorg(config).backbone.text_encoder
    fill(encoder)
    batch = random_batch(config, 16)

    def padded(dtype: torch.dtype) -> torch.Tensor:
        positions = encoder.position_embedding(torch.arange(batch.ids.shape[1]))
        x = (encoder.token_embedding(batch.ids) + positions).to(dtype)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x[torch.arange(len(x)), torch.tensor(batch.lengths) - 1])

    def run(features: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, features.numel()).view_as(features)
        return [features, *torch.autograd.grad((features.float() * weights).sum(), list(encoder.parameters()))]

    truth = run(padded(torch.float32))
    ends_given, ends_found = (run(encoder(batch.ids, dtype, lengths)) for lengths in (batch.lengths, None))
    errors = [(value - exact).abs().max() for value, exact in zip(run(padded(dtype)), truth, strict=True)]
    for given, found, exact, error in zip(ends_given, ends_found, truth, errors, strict=True):
        assert torch.equal(given, found)
        assert (given - exact).abs().max() <= 2 * error + 1e-5 * exact.abs().max()


def test_captions_whose_ends_do_not_fit_are_refused():
    encoder = MixReorg(tiny_config()).backbone.text_encoder
    ids = torch.ones(2, 5, dtype=torch.int64)
    for lengths in ([3], [3, 6]):
        with pytest.raises(ValueError, match=r"do not fit ids \[2, 5\]"):
            encoder(ids, torch.float32, lengths)


def test_a_share_of_the_mixing_groups_is_mixed_without_context():
    model = module(mixing={"context_share": 0.5, "group_size": 2, "blend": 0.5})
    batch, encoder = random_batch(model.config, 8), model.backbone.image_encoder
    plan, contextual = model._plan(batch), model._contextual(batch)
    assert contextual.flatten().tolist() == [False, False, True, True] * 2  # two groups of four, evenly
    embedded = encoder.begin(batch.images, model.dtype)
    tokens = encoder.run_blocks(embedded, 0, 0, 1)
    original, mixed = model.contextual_mixing(embedded, plan, None, contextual).chunk(2)
    torch.testing.assert_close(original, tokens)
    for source, rows in ((tokens, contextual.flatten()), (embedded, ~contextual.flatten())):
        torch.testing.assert_close(mixed[rows], ops.mix_tokens(source, plan)[8:][rows])
    # Blending too: without context a mixed image sees nothing of the original branch.
    changed = embedded.clone().requires_grad_()
    tokens = torch.cat([changed, mixed.detach()])
    after = model.progressive_mixing(tokens, plan, None, contextual)
    for rows, depends in ((contextual.flatten(), True), (~contextual.flatten(), False)):
        (gradient,) = torch.autograd.grad(after[8:][rows].sum(), changed, retain_graph=True, allow_unused=True)
        assert bool(gradient is not None and gradient.abs().sum() > 0) == depends


def test_ranks_choose_the_same_groups_to_mix_with_context():
    model = module(mixing={"context_share": 0.25, "group_size": 2})
    batch = random_batch(model.config, 16)
    whole = model._contextual(batch)
    assert whole.float().mean() == 0.25
    halves = [replace(batch, images=batch.images[:8]), replace(batch, images=batch.images[8:], first_image=8)]
    assert torch.equal(whole, torch.cat([model._contextual(half) for half in halves]))
    assert module()._contextual(batch) is None  # every group is mixed with context
