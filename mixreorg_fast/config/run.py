"""Settings of a run: training, reports, evaluation, checkpoints, DeepSpeed, and all sections together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from ..errors import UserError
from ..names import TEMPLATES, parse_templates
from .data import DataConfig
from .model import LossConfig, MixingConfig, ModelConfig, ScheduleConfig
from .section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, describe, key

if TYPE_CHECKING:
    import torch


class TrainConfig(Section):
    batch: Positive = key(4096, "images per optimizer step over all ranks")
    accumulation: Positive = key(1, "micro-steps per optimizer step")
    grad_cache: bool = key(False, "accumulate with losses over the whole batch (one more forward)")
    steps: Positive | None = key(None, "optimizer steps; overrides epochs")
    epochs: PositiveFloat = key(30, "passes over the training set")
    optimizer: Literal["adamw", "muon"] = key("adamw", "muon: AdamW, with orthogonalised updates of weight matrices")
    lr: PositiveFloat = key(1.6e-3, "peak of the learning rate")
    min_lr: NonNegativeFloat = key(4e-5, "learning rate at the end")
    warmup_steps: NonNegative | None = key(None, "steps of warm-up; overrides warmup_epochs")
    warmup_epochs: NonNegativeFloat = key(2, "epochs of warm-up: the learning rate rises linearly")
    weight_decay: NonNegativeFloat = key(0.05, "weight decay of weight matrices")
    betas: tuple[Fraction, Fraction] = key((0.9, 0.999), "AdamW's decay rates of the two moments")
    clip: NonNegativeFloat = key(5.0, "gradient norm limit, 0 = off")
    precision: Literal["auto", "bf16", "fp32"] = key(
        "auto", "dtype of activations (weights are fp32); auto: bf16 on a GPU or CPU with bf16 products, else fp32"
    )
    tf32: bool = key(False, "compute fp32 matmuls and convolutions of a GPU in TF32")
    checkpoint_activations: bool = key(False, "recompute activations in backward: less memory, more time")
    compile: bool | None = key(None, "torch.compile the network; null: on a GPU, except with ZeRO-3")
    cuda_graphs: bool | None = key(
        None,
        "replay compiled encoders from CUDA graphs; null: the image encoder, if it is compiled on a GPU and its "
        "activations are not recomputed; true: the text encoder too, recorded for each number of caption rows",
    )
    log_every: Positive = key(10, "steps between reports")
    spike: NonNegativeFloat = key(
        100.0, "skip steps above this multiple of the mean gradient norm; 0 = only NaN and inf"
    )
    max_skipped: Positive = key(3, "consecutive skipped steps that stop the run")
    # At most half of ranks.PATIENCE: collectives that give up do not name the missing rank.
    timeout: float = key(600.0, "seconds without progress that end the run; compiling is not counted", gt=0, le=43_200)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; a ValueError if precision is "auto", which training resolves by the device."""
        import torch

        if self.precision == "auto":
            raise ValueError("train.precision is 'auto'; a network needs bf16 or fp32")
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def problems(self) -> Iterator[str]:
        if self.tf32 and self.precision != "fp32":
            yield f"tf32 needs precision fp32, got {self.precision}"
        if self.cuda_graphs and self.compile is False:
            yield "cuda_graphs needs compile null or true"
        if self.cuda_graphs and self.checkpoint_activations:
            # A forward within backward replays graphs, whose memory holds gradients that backward still needs.
            yield "cuda_graphs and checkpoint_activations exclude each other"


class LogConfig(Section):
    wandb: str | None = key(None, "Weights & Biases project for the metrics; null: none")
    slow_rank: PositiveFloat = key(0.2, "name a rank slower than the mean by more than this share")


class InferenceConfig(Section):
    """How photos are segmented: part of a run's ``eval`` section, and the ``inference`` section of model.json."""

    short_side: Positive = key(448, "pixels of a photo's short side at the network's input")
    mode: Literal["whole", "sliding"] = key("whole", "the whole photo at once, or sliding windows")
    window: Positive = key(448, "side of a sliding window in pixels")
    stride: Positive = key(224, "pixels between sliding windows")
    decoding: Literal["groupvit", "direct"] = key("groupvit", "how evaluation decodes segments to labels")
    background_threshold: Fraction | None = key(
        None,
        "segments whose best score is below min(this, the photo's best score) are background; null: the dataset's "
        "usual threshold",
    )
    templates: tuple[str, ...] = key(TEMPLATES["default"], "prompt templates, {} for the class name")

    @field_validator("templates", mode="before")
    @classmethod
    def _read_templates(cls, value: Any) -> Any:
        try:
            return parse_templates(value)
        except UserError as error:
            raise ValueError(str(error)) from None

    def problems(self) -> Iterator[str]:
        if self.stride > self.window:
            yield f"stride {self.stride} leaves gaps between windows of {self.window} (at most {self.window})"

    def with_options(self, **options: Any) -> InferenceConfig:
        """These settings, overridden by those of `options` that are not None.

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
    name: str = Field(description="name of the dataset in the scores")
    dataset: str = key("plain", "folder layout, as in `mixreorg evaluate --dataset`")
    root: str = Field(description="folder of the dataset")
    split: str = key("val", "split of the dataset")
    background_threshold: Fraction | None = key(None, "overrides eval.background_threshold")
    limit: Positive | None = key(None, "score only this many images")


class EvalConfig(InferenceConfig):
    datasets: list[EvalDatasetConfig] = key([], "datasets to score; embedded data: the held-out scenes")
    every: NonNegative = key(0, "steps between validations, 0 = only at the end")
    every_images: Positive = key(100, "images per dataset in a validation during training")


class CheckpointConfig(Section):
    every: NonNegative = key(1000, "steps between checkpoints, 0 = only the last")
    keep: Positive = key(2, "newest checkpoints to keep, besides the best weights")


class DeepSpeedConfig(Section):
    zero_stage: int = key(2, "ZeRO stage: 1 partitions moments, 2 also gradients, 3 also parameters", ge=0, le=3)
    offload_optimizer: bool = key(False, "keep moments in the CPU's memory")
    offload_parameters: bool = key(False, "keep parameters in the CPU's memory, with stage 3")
    options: dict[str, Any] = key({}, "further DeepSpeed keys, passed on unchanged")

    def problems(self) -> Iterator[str]:
        if self.offload_optimizer and self.zero_stage == 0:
            yield "offload_optimizer needs zero_stage 1, 2 or 3"
        if self.offload_parameters and self.zero_stage != 3:
            yield f"offload_parameters needs zero_stage 3, got {self.zero_stage}"
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
        for option in self.options:
            if option in owned:
                yield f"options.{option} is set by {owned[option]}"


class Config(Section):
    """A run. ``config.json`` of a run folder holds these settings, resolved."""

    name: str = key("mixreorg", "name of the run and of its folder")
    output: str = key("runs", "folder of run folders")
    seed: int = key(0, "seed of all random numbers of the run")
    model: ModelConfig = Field(default_factory=ModelConfig)
    mixing: MixingConfig = Field(default_factory=MixingConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    def problems(self) -> Iterator[str]:
        if self.model.method == "mixreorg" and self.mixing.context_blocks >= self.model.depths[0]:
            yield (
                f"mixing.context_blocks {self.mixing.context_blocks} leaves no stage-1 block to mix in "
                f"(nearest: {self.model.depths[0] - 1} of model.depths[0] {self.model.depths[0]})"
            )
        if self.model.method == "mixreorg" and not self.loss.mixed and not self.loss.restored:
            yield "loss.mixed and loss.restored are both 0, which is model.method 'groupvit'"
        mixed = self.train.batch / (1 if self.train.grad_cache else self.train.accumulation) / self.mixing.group_size
        if self.model.method == "mixreorg" and self.mixing.context_share < min(1.0, 1 / mixed):
            yield (
                f"mixing.context_share {self.mixing.context_share} of {mixed:g} mixing groups leaves none with context "
                f"(nearest: {1 / mixed:g})"
            )
        if self.train.optimizer == "muon" and (self.deepspeed.zero_stage == 3 or self.deepspeed.offload_optimizer):
            yield "train.optimizer muon needs deepspeed.zero_stage 0, 1 or 2 without offload_optimizer"
        if self.train.cuda_graphs and self.deepspeed.zero_stage == 3:
            yield "train.cuda_graphs needs weights that stay: deepspeed.zero_stage 0, 1 or 2, not 3"

    @property
    def inference(self) -> InferenceConfig:
        """The settings stored with the weights: those of evaluation, with a threshold only if all datasets share it."""
        usual = self.eval.background_threshold
        own = [dataset.background_threshold for dataset in self.eval.datasets] or [None]
        thresholds = [usual if threshold is None else threshold for threshold in own]
        shared = thresholds[0] if len(set(thresholds)) == 1 else None
        return self.eval.with_options().model_copy(update={"background_threshold": shared})

    def compiles(self, device_type: str) -> bool:
        """Whether training compiles the network on this type of device."""
        if self.train.compile is None:
            return device_type == "cuda" and self.deepspeed.zero_stage < 3
        return self.train.compile

    def replays(self, device_type: str) -> bool:
        """Whether training replays the compiled image encoder from CUDA graphs on this type of device."""
        if self.train.cuda_graphs is None:
            able = self.deepspeed.zero_stage < 3 and not self.train.checkpoint_activations
            return able and device_type == "cuda" and self.compiles(device_type)
        return self.train.cuda_graphs

    @property
    def group_size(self) -> int:
        """Images whose patches are mixed with each other; 1 without mixing."""
        return self.mixing.group_size if self.model.method == "mixreorg" else 1

    def batch_unit(self, world_size: int) -> int:
        """The number that must divide `train.batch`: ranks x micro-steps x mixing group."""
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
                f"train.batch {self.train.batch} is not a multiple of {unit} = {world_size} ranks x train.accumulation "
                f"{self.train.accumulation} x mixing.group_size {self.group_size} (nearest: {choices})"
            )
        return self.train.batch // (world_size * self.train.accumulation)
