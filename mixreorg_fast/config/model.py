"""Settings of the network and of the method: model, mixing, losses, schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, key


class TextConfig(Section):
    """Text encoder: a causal transformer, features taken at the end-of-text token."""

    width: Positive = key(256, "channels")
    heads: Positive = key(4, "attention heads")
    layers: Positive = key(12, "transformer blocks")
    context: Positive = key(77, "tokens; longer captions are truncated")
    vocab_size: NonNegative = key(0, "0: the tokenizer's size")


class ModelConfig(Section):
    """Backbone (GroupViT): three stages, a grouping block after each of the first two."""

    method: Literal["mixreorg", "groupvit"] = key("mixreorg", "groupvit: the baseline, without mixing")
    image_size: Positive = key(224, "side of training images in pixels")
    patch_size: Positive = key(16, "side of a patch in pixels")
    width: Positive = key(384, "channels of the image encoder")
    heads: Positive = key(6, "attention heads of the image encoder")
    depths: tuple[Positive, Positive, Positive] = key((6, 3, 3), "transformer blocks of each stage")
    groups: tuple[Positive, Positive] = key((64, 8), "group tokens of stages 1 and 2, one per segment")
    embed_dim: Positive = key(256, "channels of the embeddings that images and texts share")
    projection_hidden: Positive = key(4096, "hidden channels of the two projections")
    drop_path: Fraction = key(0.1, "stochastic depth rate of the last block; grows linearly from 0")
    hard_assignment: bool = key(True, "hard one-hot assignment with straight-through gradients")
    gumbel: bool = key(True, "Gumbel noise on the assignment logits while training")
    tau: PositiveFloat = key(1.0, "temperature of the assignment's softmax, in evaluation too")
    init_std: PositiveFloat = key(0.02, "standard deviation of the image encoder's initial weights")
    text: TextConfig = Field(default_factory=TextConfig)
    init: str | None = key(None, "weights to start from: a folder, a .pth file, or owner/name on the hub")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def problems(self) -> Iterator[str]:
        if self.image_size % self.patch_size:
            low = self.image_size // self.patch_size * self.patch_size
            yield (
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size} "
                f"(nearest: {max(low, self.patch_size)} or {low + self.patch_size})"
            )
        for name, width, heads in (("", self.width, self.heads), ("text.", self.text.width, self.text.heads)):
            if width % heads:
                divisors = [n for n in range(1, width + 1) if width % n == 0]
                best = min(divisors, key=lambda n: abs(n - heads))
                yield f"{name}width {width} is not a multiple of {name}heads {heads} (nearest: {best} heads)"


class MixingConfig(Section):
    """MixReorg, section 3; the values are ours (the paper's are not available to us)."""

    context_blocks: NonNegative = key(2, "stage-1 blocks before patches are mixed")
    context_share: Annotated[float, Field(gt=0.0, le=1.0)] = key(
        1.0, "share of the mixing groups whose patches are mixed with context; the others are mixed as embedded"
    )
    group_size: int = key(4, "images whose patches are mixed with each other", ge=2)
    blend: Fraction = key(0.5, "share of the original features in each progressive blend")
    group_tokens: Literal["mean", "learned"] = key(
        "mean", "group tokens of the mixed and restored branches: the mixing group's mean, or learned"
    )


class LossConfig(Section):
    """L = original * L_original + restored * L_restored + mixed * L_mixed (+ multi_label * the noun loss)."""

    original: NonNegativeFloat = key(1.0, "weight of the contrastive loss of the images")
    restored: NonNegativeFloat = key(1.0, "weight of the contrastive loss of the restored images")
    mixed: NonNegativeFloat = key(1.0, "weight of the mixed segmentation loss")
    mixed_negatives: Literal["group", "batch", "attributed"] = key(
        "group",
        "negative texts of a mixed patch: those of its mixing group, or of the whole batch; attributed: of the whole "
        "batch, weighted by how surely the patch is attributed to its image within the group",
    )
    multi_label: NonNegativeFloat = key(0.0, "weight of the contrastive loss of nouns")
    exchange: Literal["gather", "ring"] = key(
        "gather", "how ranks exchange features; ring: those of one rank at a time, with less memory for large batches"
    )


class ScheduleConfig(Section):
    """Values that change during a run. With the defaults nothing changes, as in the papers."""

    share: Fraction = key(0.5, "fraction of training over which the schedules run")
    tau_start: PositiveFloat | None = key(None, "initial tau, falls to model.tau; null: model.tau")
    noise_start: NonNegativeFloat = key(1.0, "initial scale of the Gumbel noise (model.gumbel)")
    noise_end: NonNegativeFloat = key(1.0, "final scale of the Gumbel noise, reached linearly")
    soft_start: bool = key(False, "soft assignment while the schedules run, then model.hard_assignment")
    mixed_start: NonNegativeFloat = key(1.0, "initial factor of loss.mixed; reaches 1 linearly")

    def progress(self, done: float) -> float:
        """Progress of the schedules, 0 to 1, after the fraction `done` of the run."""
        return min(done / self.share, 1.0) if self.share else 1.0

    def tau(self, end: float, progress: float) -> float:
        """Temperature of the assignment; `end`: model.tau."""
        return end if self.tau_start is None else self.tau_start * (end / self.tau_start) ** progress

    def noise(self, progress: float) -> float:
        """Scale of the Gumbel noise."""
        return self.noise_start + (self.noise_end - self.noise_start) * progress

    def mixed(self, progress: float) -> float:
        """Factor of the weight of the mixed segmentation loss."""
        return self.mixed_start + (1.0 - self.mixed_start) * progress
