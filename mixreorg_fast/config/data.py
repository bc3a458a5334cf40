"""Settings of the training data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ByteSize, Discriminator, Field, Tag, TypeAdapter, ValidationError, field_validator

from .section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, key


class AugmentConfig(Section):
    """Image augmentation; the defaults are GroupViT's recipe."""

    crop_scale: tuple[Fraction, Fraction] = key((0.08, 1.0), "share of the photo's area in a crop")
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = key((3 / 4, 4 / 3), "width : height of a crop")
    flip: Fraction = key(0.5, "probability of a horizontal flip")
    color_jitter: NonNegativeFloat = key(0.0, "strength; ignored with RandAugment")
    rand_augment_ops: NonNegative = key(2, "RandAugment: operations per image, 0 = off")
    rand_augment_magnitude: int = key(27, "RandAugment: 27 of 30 is timm's 9 of 10", ge=0, le=30)
    rand_augment_probability: Fraction = key(0.5, "RandAugment: probability of an operation, as in timm")
    random_erasing: Fraction = key(0.25, "probability of erasing a rectangle")

    def problems(self) -> Iterator[str]:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high or low <= 0:
                yield f"{name} must be two rising numbers above 0, got [{low}, {high}]"


class ScenesConfig(Section):
    """The embedded data: procedurally drawn scenes, stored as shards and as a plain evaluation folder."""

    folder: str = key("data/scenes", "folder of the scenes")
    train: Positive = key(20000, "scenes of the training set")
    val: Positive = key(400, "scenes of each evaluation set")
    size: Positive = key(64, "side of a scene in pixels")
    seed: int = key(0, "seed of the drawing")
    objects: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = key(
        (3, 4, 3), "frequencies of 1, 2 and 3 objects in a scene"
    )
    scale: float = key(1.0, "factor of the objects' size", ge=1.0, le=1.5)
    grounds: int = key(12, "kinds of ground in use", ge=1, le=12)
    typical: Fraction = key(0.0, "share of objects in the typical colour (or pattern) of their kind")
    detail: Fraction = key(1.0, "factor of how often captions mention colours, patterns and grounds")

    def problems(self) -> Iterator[str]:
        if not any(self.objects):
            yield "objects: one of the three frequencies must be above 0"


class ShardSetConfig(Section):
    """One of several sets of shards whose samples a run mixes."""

    pattern: str | list[str] = Field(description="brace or glob patterns")
    weight: PositiveFloat = key(1.0, "relative frequency of samples of this set")


def _form_of_shards(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else value
    return ":sets" if isinstance(first, dict | ShardSetConfig) else ":list" if isinstance(value, list) else ":pattern"


_Forms = (
    Annotated[str, Tag(":pattern")] | Annotated[list[str], Tag(":list")] | Annotated[list[ShardSetConfig], Tag(":sets")]
)
# The form is chosen before validation, so that an error names the problem of that form instead of all forms' problems.
Shards = Annotated[_Forms, Discriminator(_form_of_shards)]


def are_scenes(shards: Any, folder: str) -> bool:
    """Whether ``data.shards`` are the embedded scenes in `folder`; a resolved configuration lists their files."""
    if shards is None:
        return True
    drawn = isinstance(shards, list) and all(isinstance(each, str) for each in shards)
    return drawn and {str(Path(each).parent) for each in shards} == {str(Path(folder))}


class CacheConfig(Section):
    """The cache of shards that are fetched from the hub, S3 or a web server."""

    folder: str | None = key(None, "null: ~/.cache/mixreorg/remote")
    size: str = key("100 GB", "bytes of shards on the disk; above this, shards that are not needed soon are evicted")
    window: Positive = key(16, "remote shards whose samples are shuffled together; two windows must fit")
    workers: Positive = key(4, "shards fetched at a time, per node")
    patience: PositiveFloat = key(300.0, "seconds without a byte after which the run gives up on a source")

    @field_validator("size")
    @classmethod
    def _readable(cls, value: str) -> str:
        try:
            TypeAdapter(ByteSize).validate_python(value)
        except ValidationError:
            raise ValueError(f"expected bytes such as '100 GB' or '1.5 TiB', got {value!r}") from None
        return value

    @property
    def capacity(self) -> int:
        return TypeAdapter(ByteSize).validate_python(self.size)

    @property
    def path(self) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixreorg" / "remote"
        return cache if self.folder is None else Path(self.folder).expanduser()


class DataConfig(Section):
    shards: Shards | None = key(None, "brace or glob patterns, or weighted sets of them; null: embedded scenes")
    val_shards: str | list[str] | None = key(None, "shards of image-text pairs for retrieval R@1")
    tokenizer: str | None = key(
        None, "a tokenizer.json, or owner/name on the hub; null: one is trained on the captions"
    )
    vocab_size: Positive = key(8192, "size of a tokenizer trained on the captions")
    verify: bool = key(True, "decode every photo of unverified shards before training")
    max_bad: Fraction = key(0.01, "the run stops when more than this share of the samples is bad")
    nouns: NonNegative = key(3, "noun prompts per caption when loss.multi_label is on")
    threads: Positive | None = key(None, "reading threads per rank; null: the rank's share of the cores, at most 16")
    hw_decoder_load: Fraction | None = key(None, "share of JPEGs for a GPU's JPEG hardware; null: DALI's 0.65")
    prefetch: Positive = key(2, "batches read ahead")
    cache: CacheConfig = Field(default_factory=CacheConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    scenes: ScenesConfig = Field(default_factory=ScenesConfig)

    @property
    def is_scenes(self) -> bool:
        """Whether training reads the embedded scenes."""
        return are_scenes(self.shards, self.scenes.folder)
