"""One file holds a whole run: model, method, data, optimisation, evaluation. This module is its schema.

``load_config("configs/zero2.json", ["train.steps=100"])`` reads, overrides and validates; everything a user can get
wrong ends in a :class:`~mixreorg_fast.errors.UserError` of one line. Defaults are the paper-scale setting
(GroupViT, CVPR 2022, section 4.1 and its supplement; what MixReorg leaves open is marked "ours").
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from .errors import UserError, nearest
from .names import TEMPLATES, parse_templates

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Frequency = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys and silently converted types are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class TextConfig(Section):
    """Text encoder: a causal transformer, features taken at the end-of-text token."""

    width: Positive = Field(256, description="channels")
    heads: Positive = Field(4, description="attention heads")
    layers: Positive = Field(12, description="transformer blocks")
    context: Positive = Field(77, description="tokens; longer captions are cut")
    vocab_size: NonNegative = Field(0, description="0: the tokenizer's size")


class ModelConfig(Section):
    """Backbone (GroupViT): three stages, a grouping block after each of the first two."""

    method: Literal["mixreorg", "groupvit"] = Field("mixreorg", description="groupvit: the baseline, without mixing")
    image_size: Positive = Field(224, description="pixels, the side of training images")
    patch_size: Positive = Field(16, description="pixels, the side of a patch")
    width: Positive = Field(384, description="channels of the image encoder")
    heads: Positive = Field(6, description="attention heads of the image encoder")
    depths: tuple[Positive, Positive, Positive] = Field((6, 3, 3), description="transformer blocks of each stage")
    groups: tuple[Positive, Positive] = Field((64, 8), description="group tokens, and so segments, of stages 1 and 2")
    embed_dim: Positive = Field(256, description="channels of the embeddings that images and texts share")
    projection_hidden: Positive = Field(4096, description="hidden channels of the two projections")
    drop_path: Fraction = Field(0.1, description="stochastic depth of the last block, growing from 0")
    hard_assignment: bool = Field(True, description="hard one-hot assignment with straight-through gradients")
    gumbel: bool = Field(True, description="Gumbel noise on the assignment logits while training")
    tau: PositiveFloat = Field(1.0, description="temperature of the assignment's softmax, in evaluation too")
    init_std: PositiveFloat = Field(0.02, description="of the image encoder's linear weights when training begins")
    text: TextConfig = TextConfig()
    init: str | None = Field(None, description="folder of weights to start from")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.image_size % self.patch_size:
            low = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size} "
                f"(nearest: {max(low, self.patch_size)} or {low + self.patch_size})"
            )
        for name, width, heads in (("", self.width, self.heads), ("text.", self.text.width, self.text.heads)):
            if width % heads:
                divisors = [n for n in range(1, width + 1) if width % n == 0]
                best = min(divisors, key=lambda n: abs(n - heads))
                raise ValueError(f"{name}width {width} is no multiple of {name}heads {heads} (nearest: {best} heads)")
        return self


class MixingConfig(Section):
    """MixReorg, section 3; the values are ours (the paper's are not available to us)."""

    context_blocks: NonNegative = Field(2, description="stage-1 blocks before patches are mixed")
    group_size: Annotated[int, Field(ge=2)] = Field(4, description="images whose patches are mixed with one another")
    blend: Fraction = Field(0.5, description="share of the original features in each progressive blend")
    group_tokens: Literal["mean", "learned"] = Field(
        "mean", description="group tokens of mixed images: the mean of their images', or learned"
    )


class LossConfig(Section):
    """L = original * L_original + restored * L_restored + mixed * L_mixed (+ multi_label * the noun loss)."""

    original: Annotated[float, Field(ge=0.0)] = Field(1.0, description="weight of the contrastive loss of the images")
    restored: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="weight of the contrastive loss of the restored images"
    )
    mixed: Annotated[float, Field(ge=0.0)] = Field(1.0, description="weight of the mixed segmentation loss")
    mixed_negatives: Literal["group", "batch"] = Field(
        "group", description="texts that a mixed patch is held against: its mixing group's, or the whole batch's"
    )
    multi_label: Annotated[float, Field(ge=0.0)] = Field(0.0, description="weight of the contrastive loss of nouns")
    exchange: Literal["gather", "ring"] = Field(
        "gather", description="of features between ranks; ring: a rank's at a time, for batches whose features are big"
    )


class ScheduleConfig(Section):
    """What changes in the course of a run; the defaults change nothing, which is the setting of the papers."""

    share: Fraction = Field(0.5, description="of the steps, over which the values below run to their ends")
    tau_start: PositiveFloat | None = Field(None, description="falls geometrically to model.tau; null: model.tau")
    noise_start: Annotated[float, Field(ge=0.0)] = Field(1.0, description="scale of the Gumbel noise (model.gumbel)")
    noise_end: Annotated[float, Field(ge=0.0)] = Field(1.0, description="of the noise, reached linearly")
    soft_start: bool = Field(False, description="soft assignment at first, then what model.hard_assignment says")
    mixed_start: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="factor of loss.mixed at first, 0 for a warm-up; reaches 1 linearly"
    )

    def progress(self, done: float) -> float:
        """How far the schedules are, 0 to 1, after the share `done` of the run."""
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


class AugmentConfig(Section):
    """Image augmentation; the defaults are GroupViT's recipe."""

    crop_scale: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="share of the photo's area a crop keeps")
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = Field((3 / 4, 4 / 3), description="width : height of a crop")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    color_jitter: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="strength; unused where RandAugment is on, as in GroupViT's recipe"
    )
    rand_augment_ops: NonNegative = Field(2, description="RandAugment: operations per image, 0 = off")
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(
        27, description="of 30; 27 is the recipe's 9 on timm's scale of 10"
    )
    rand_augment_probability: Fraction = Field(0.5, description="chance of each operation to be applied, as in timm")
    random_erasing: Fraction = Field(0.25, description="probability of erasing a rectangle")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high or low <= 0:
                raise ValueError(f"{name} must be two rising numbers above 0, got [{low}, {high}]")
        return self


class ScenesConfig(Section):
    """The embedded data: procedurally drawn scenes, written as shards and as a plain evaluation folder."""

    folder: str = Field("data/scenes", description="where they are stored")
    train: Positive = Field(20000, description="scenes to train on")
    val: Positive = Field(400, description="scenes of each evaluation set")
    size: Positive = Field(64, description="pixels, the side of a scene")
    seed: int = Field(0, description="of the drawing")
    objects: tuple[Frequency, Frequency, Frequency] = Field((3, 4, 3), description="how often 1, 2 and 3 objects")
    scale: Annotated[float, Field(ge=1.0, le=1.5)] = Field(1.0, description="size of the objects")
    grounds: Annotated[int, Field(ge=1, le=12)] = Field(12, description="kinds of ground in use")
    typical: Fraction = Field(
        0.0, description="share of objects in a colour (or pattern) that is their kind's own, as most things have one"
    )
    detail: Fraction = Field(1.0, description="how readily captions tell colours, patterns and grounds")

    @model_validator(mode="after")
    def _some_objects(self) -> ScenesConfig:
        if not any(self.objects):
            raise ValueError("objects: one of the three frequencies must be above 0")
        return self


class ShardSetConfig(Section):
    """One of several sets of shards that a run mixes."""

    pattern: str | list[str] = Field(description="brace or glob patterns")
    weight: PositiveFloat = Field(1.0, description="how often it is drawn, relative to the others")


def _form_of_shards(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else value
    return ":sets" if isinstance(first, dict | ShardSetConfig) else ":list" if isinstance(value, list) else ":pattern"


# The form is told beforehand, so that a mistake is told of that form rather than of all of them.
Shards = Annotated[
    Annotated[str, Tag(":pattern")]
    | Annotated[list[str], Tag(":list")]
    | Annotated[list[ShardSetConfig], Tag(":sets")],
    Discriminator(_form_of_shards),
]


def are_scenes(shards: Any, folder: str) -> bool:
    """Whether ``data.shards`` are the embedded scenes in `folder`, which a resolved configuration lists one by one."""
    if shards is None:
        return True
    drawn = isinstance(shards, list) and all(isinstance(each, str) for each in shards)
    return drawn and {str(Path(each).parent) for each in shards} == {str(Path(folder))}


class DataConfig(Section):
    shards: Shards | None = Field(
        None, description="training shards: brace or glob patterns, or sets of them with weights; null: scenes"
    )
    val_shards: str | list[str] | None = Field(None, description="image-text pairs for retrieval R@1")
    tokenizer: str | None = Field(None, description="tokenizer.json; null: one is trained on the captions")
    vocab_size: Positive = Field(8192, description="size of a tokenizer trained on the captions")
    verify: bool = Field(True, description="decode shards that are not verified yet before training reads them")
    max_bad: Fraction = Field(0.01, description="share of unusable samples that stops the run")
    nouns: NonNegative = Field(3, description="noun prompts per caption when loss.multi_label is on")
    threads: Positive | None = Field(
        None, description="threads of a rank that read and decode; null: its share of the node's cores, at most 16"
    )
    hw_decoder_load: Fraction | None = Field(
        None, description="share of the JPEGs for a GPU's JPEG hardware; null: DALI's own (0.65)"
    )
    prefetch: Positive = Field(2, description="batches read ahead")
    augment: AugmentConfig = AugmentConfig()
    scenes: ScenesConfig = ScenesConfig()

    @property
    def is_scenes(self) -> bool:
        """Whether training reads the embedded scenes."""
        return are_scenes(self.shards, self.scenes.folder)


class TrainConfig(Section):
    batch: Positive = Field(4096, description="images per optimizer step over all ranks")
    accumulation: Positive = Field(1, description="micro-steps per optimizer step")
    grad_cache: bool = Field(
        False,
        description="accumulation keeps the losses over the whole batch, not each micro-step's (one more forward)",
    )
    steps: Positive | None = Field(None, description="optimizer steps; overrules epochs")
    epochs: PositiveFloat = Field(30, description="of the training set")
    lr: PositiveFloat = Field(1.6e-3, description="peak of the learning rate")
    min_lr: Annotated[float, Field(ge=0.0)] = Field(4e-5, description="learning rate at the end")
    warmup_steps: NonNegative | None = Field(None, description="overrules warmup_epochs")
    warmup_epochs: Annotated[float, Field(ge=0.0)] = Field(2, description="epochs of linearly rising learning rate")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.05, description="of weight matrices")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="of AdamW")
    clip: Annotated[float, Field(ge=0.0)] = Field(5.0, description="gradient norm limit, 0 = off")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of activations; weights are fp32")
    tf32: bool = Field(False, description="fp32 matrix products and convolutions of a GPU in TF32")
    checkpoint_activations: bool = Field(False, description="recompute activations in backward: less memory, more time")
    compile: bool | None = Field(
        None,
        description="torch.compile of the network; null: on a GPU, but for ZeRO-3, which gathers weights in hooks",
    )
    cuda_graphs: bool = Field(
        False,
        description="compiled parts of the encoders in CUDA graphs: fewer launches, for more memory; not with ZeRO-3",
    )
    log_every: Positive = Field(10, description="steps between reports")
    spike: Annotated[float, Field(ge=0.0)] = Field(
        100.0, description="skip a step whose gradient norm is so many times the running mean's; 0 = only NaN and inf"
    )
    max_skipped: Positive = Field(3, description="skipped steps in a row that stop the run")
    # Half of what collectives wait (training/distributed.py), which give up without a name.
    timeout: Annotated[float, Field(gt=0.0, le=43_200.0)] = Field(
        600.0, description="seconds a rank may hang in a step; compiling is not counted"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.tf32 and self.precision != "fp32":
            raise ValueError(f"tf32 needs precision fp32, got {self.precision}")
        if self.cuda_graphs and self.compile is False:
            raise ValueError("cuda_graphs needs compile null or true")
        if self.cuda_graphs and self.checkpoint_activations:
            # A forward within backward begins a new round of graphs, over the memory of the gradients on their way.
            raise ValueError("cuda_graphs and checkpoint_activations exclude each other")
        return self


class LogConfig(Section):
    wandb: str | None = Field(None, description="Weights & Biases project to report to as well; null: none")
    slow_rank: Annotated[float, Field(gt=0.0)] = Field(
        0.2, description="name a rank that is slower than the ranks' mean by so large a share"
    )


class InferenceConfig(Section):
    """How photos are seen and named: part of a run's ``eval`` section, and the ``inference`` section of model.json."""

    short_side: Positive = Field(448, description="pixels at which the network sees a photo")
    mode: Literal["whole", "sliding"] = Field("whole", description="a photo at once, or through windows")
    window: Positive = Field(448, description="pixels, of mode sliding")
    stride: Positive = Field(224, description="pixels between windows")
    decoding: Literal["groupvit", "direct"] = Field("groupvit", description="of segments to labels, in evaluation")
    background_threshold: Fraction | None = Field(
        None, description="segments that score less are background; null: the data set's usual one, if it has any"
    )
    templates: tuple[str, ...] = Field(TEMPLATES["default"], description="prompts, {} for the class name")

    @field_validator("templates", mode="before")
    @classmethod
    def _read_templates(cls, value: Any) -> Any:
        try:
            return parse_templates(value)
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _windows_touch(self) -> InferenceConfig:
        if self.stride > self.window:
            raise ValueError(
                f"stride {self.stride} leaves gaps between windows of {self.window} (at most {self.window})"
            )
        return self

    def with_options(self, **options: Any) -> InferenceConfig:
        """These settings alone, overruled by those of `options` that are not None.

        Raises:
            UserError: an unknown option, or a value that does not fit.
        """
        own = {name: getattr(self, name) for name in InferenceConfig.model_fields}
        given = {name: value for name, value in options.items() if value is not None}
        try:
            return InferenceConfig.model_validate(own | given)
        except ValidationError as error:
            raise UserError(describe(error, InferenceConfig)) from None


class EvalDatasetConfig(Section):
    name: str = Field(description="of its scores")
    dataset: str = Field("plain", description="folder layout, as in `mixreorg evaluate --dataset`")
    root: str = Field(description="its folder")
    split: str = Field("val", description="of the data set")
    background_threshold: Fraction | None = Field(None, description="overrules eval.background_threshold")
    limit: Positive | None = Field(None, description="score only this many images")


class EvalConfig(InferenceConfig):
    datasets: list[EvalDatasetConfig] = Field([], description="empty with embedded data: the held-out scenes")
    every: NonNegative = Field(0, description="validate each so many steps, 0 = only at the end")
    every_images: Positive = Field(100, description="images per data set in a validation during training")


class CheckpointConfig(Section):
    every: NonNegative = Field(1000, description="steps between checkpoints, 0 = only the last")
    keep: Positive = Field(2, description="newest checkpoints kept, besides the best")


class DeepSpeedConfig(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        2, description="what ranks partition: 1 moments, 2 gradients too, 3 parameters too"
    )
    offload_optimizer: bool = Field(False, description="moments in the CPU's memory")
    offload_parameters: bool = Field(False, description="parameters in the CPU's memory, with stage 3")
    options: dict[str, Any] = Field({}, description="further DeepSpeed keys, passed through as they are")

    @model_validator(mode="after")
    def _offload_needs_its_stage(self) -> DeepSpeedConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, got {self.zero_stage}")
        owned = {
            "train_batch_size": "train.batch",
            "train_micro_batch_size_per_gpu": "train.batch",
            "gradient_accumulation_steps": "train.accumulation",
            "gradient_clipping": "train.clip",
            "optimizer": "train.lr and its neighbours",
            "scheduler": "train.warmup_steps and its neighbours",
            "bf16": "train.precision",
            "fp16": "train.precision",
        }
        for key in self.options:
            if key in owned:
                raise ValueError(f"options.{key} is set by {owned[key]}")
        return self


class Config(Section):
    """A run. ``config.json`` of a run folder is exactly this, resolved."""

    name: str = Field("mixreorg", description="of the run, and of its folder")
    output: str = Field("runs", description="folder of run folders")
    seed: int = Field(0, description="of all random numbers of the run")
    model: ModelConfig = ModelConfig()
    mixing: MixingConfig = MixingConfig()
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.model.method == "mixreorg" and self.mixing.context_blocks >= self.model.depths[0]:
            raise ValueError(
                f"mixing.context_blocks {self.mixing.context_blocks} leaves no stage-1 block to mix in "
                f"(nearest: {self.model.depths[0] - 1} of model.depths[0] {self.model.depths[0]})"
            )
        if self.model.method == "mixreorg" and not self.loss.mixed and not self.loss.restored:
            raise ValueError("loss.mixed and loss.restored are both 0, which is model.method 'groupvit'")
        if self.train.cuda_graphs and self.deepspeed.zero_stage == 3:
            raise ValueError("train.cuda_graphs needs weights that stay: deepspeed.zero_stage 0, 1 or 2, not 3")
        return self

    @property
    def inference(self) -> InferenceConfig:
        """What goes with the weights: the settings of evaluation, with the threshold that all its data sets share."""
        thresholds = {dataset.background_threshold for dataset in self.eval.datasets}
        return self.eval.with_options(background_threshold=thresholds.pop() if len(thresholds) == 1 else None)

    def compiles(self, device_type: str) -> bool:
        """Whether training compiles its blocks on such a device."""
        if self.train.compile is None:
            return device_type == "cuda" and self.deepspeed.zero_stage < 3
        return self.train.compile

    @property
    def group_size(self) -> int:
        """Images whose patches are mixed with one another; 1 without mixing."""
        return self.mixing.group_size if self.model.method == "mixreorg" else 1

    def batch_unit(self, world_size: int) -> int:
        """What `train.batch` has to be a multiple of: ranks x micro-steps x mixing group."""
        return world_size * self.train.accumulation * self.group_size

    def micro_batch(self, world_size: int) -> int:
        """Images per rank and micro-step.

        Raises:
            UserError: `train.batch` does not split evenly over ranks, micro-steps and mixing groups.
        """
        unit = self.batch_unit(world_size)
        if self.train.batch % unit:
            low = self.train.batch // unit * unit
            choices = f"{low} or {low + unit}" if low else str(unit)
            raise UserError(
                f"train.batch {self.train.batch} is no multiple of {unit} = {world_size} ranks x train.accumulation "
                f"{self.train.accumulation} x mixing.group_size {self.group_size} (nearest: {choices})"
            )
        return self.train.batch // (world_size * self.train.accumulation)


def packaged_configs() -> dict[str, Path]:
    """The configurations of runs that come with the package, by name."""
    files = sorted((Path(__file__).parent / "configs").glob("*.json"))
    return {path.stem: path for path in files if not path.stem.startswith("study")}


def find_config(name: str) -> Path:
    """The file of that path, or the packaged configuration of that name.

    Raises:
        UserError: neither is there.
    """
    path, packaged = Path(name), packaged_configs()
    if path.is_file():
        return path
    if name in packaged:
        return packaged[name]
    siblings = sorted(map(str, path.parent.glob("*.json"))) if path.parent.is_dir() else []
    raise UserError(f"no configuration file {name}{nearest(name, [*siblings, *packaged])}")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON configuration, apply ``key.path=value`` overrides (values are JSON, else strings), validate.

    A file's ``"extends": "other.json"`` takes all that it does not say itself from that file.

    Raises:
        UserError: the file is missing or no JSON object; a key is unknown; a value has the wrong type or does not fit.
    """
    values = {} if path is None else _read(Path(path))
    for override in overrides:
        _apply(values, override)
    return parse_config(values, source=str(path) if path is not None else "configuration")


def parse_config(values: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validate a dictionary of values; `source` names it in errors.

    Raises:
        UserError: as :func:`load_config`.
    """
    try:
        # JSON has no tuples, so lists stand for them; every other conversion ("8" for 8, 1 for true) is refused.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{source}: {describe(error, Config)}") from None


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem pydantic found, with the nearest valid choice."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if not str(part).startswith(":")]  # those are forms, not keys
    key = ".".join(names)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(names[-1], _fields(schema, names[:-1]))}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key}: '{first['input']}' is no valid choice{nearest(first['input'], choices)}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{key}: {message}" if key else message
    message = first["msg"][0].lower() + first["msg"][1:]
    message = f"{message}, got {json.dumps(first['input'], default=str)}"
    return f"{key}: {message}" if key else message


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file, laid over those of the file that its ``"extends"`` names (relative to it)."""
    try:
        values = json.loads(path.read_text())
    except OSError:
        siblings = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise UserError(f"no configuration file {path}{nearest(str(path), siblings)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a JSON configuration was expected") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object at the top, got {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must name a configuration file, got {json.dumps(base)}")
    chain = (*extended_by, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise UserError(f"{path}: extends '{base}' leads back to itself")
    return merged(_read(path.parent / base, chain), values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = merged(base[key], value) if both else value
    return out


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, such as train.steps=100")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, last = key.split(".")
    node = values
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {'.'.join(sections[: depth + 1])} is no section")
    node[last] = value


def _fields(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields of the section that `path` leads to."""
    current: Any = schema
    for name in path:
        if name.isdigit():
            continue
        field = current.model_fields.get(name)
        if field is None:
            return []
        current = _section_of(field.annotation)
        if current is None:
            return []
    return list(current.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as ``Section``, ``list[Section]`` or ``Section | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := _section_of(part))), None)
