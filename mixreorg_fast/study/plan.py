"""What a study's file says, and the runs that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..config import Config, NonNegative, Section, describe, load_config
from ..errors import UserError, nearest

Budget = Literal["steps", "time"]
Overrides = dict[str, Any]  # {"train.steps": 900}: what `--set` takes, as JSON


class VariantConfig(Section):
    """One row of the table: a name for people, and what differs from the world's configuration."""

    about: str
    set: Overrides = {}


class WorldConfig(Section):
    """What is trained on: a training configuration, beside the study's file."""

    config: str
    set: Overrides = {}


class EqualTimeConfig(Section):
    """Variants that are trained once more, for as many steps as fit into the time that `like` took."""

    like: str
    variants: Annotated[list[str], Field(min_length=1)]


class BlockConfig(Section):
    """Runs that belong together and are run in one go."""

    world: str
    variants: Annotated[list[str], Field(min_length=1)]
    equal_time: EqualTimeConfig | None = None
    seeds: list[NonNegative] | None = Field(None, description="null: the study's")


class StudyConfig(Section):
    """A study. The first variant of a block is the one that the others are compared with."""

    name: str
    output: str = Field("runs", description="folder of study folders")
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0, 1, 2]
    worlds: dict[str, WorldConfig]
    variants: dict[str, VariantConfig]
    blocks: dict[str, BlockConfig]
    pictures: NonNegative = Field(3, description="photos that all variants are drawn on; 0: no pictures, no curves")

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @model_validator(mode="after")
    def _names_exist(self) -> StudyConfig:
        for name, block in self.blocks.items():
            of_time = block.equal_time
            named = [*block.variants, *((*of_time.variants, of_time.like) if of_time else ())]
            for variant in named:
                if variant not in self.variants:
                    raise ValueError(f"block '{name}': no variant '{variant}'{nearest(variant, self.variants)}")
                if variant not in block.variants:
                    raise ValueError(f"block '{name}': equal_time needs '{variant}' among the block's variants")
            if block.world not in self.worlds:
                raise ValueError(f"block '{name}': no world '{block.world}'{nearest(block.world, self.worlds)}")
        return self


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    study: str
    world: str  # what it trains on
    variant: str
    seed: int
    budget: Budget
    config: Config  # complete; its run folder is the run's own

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def request(self) -> Path:
        """The configuration file that the run is started with; what tells later whether it is still the same run."""
        return self.folder.with_name(f"{self.folder.name}.json")


class Study:
    """A study's file, read and checked: every run's configuration is valid before the first begins.

    Raises:
        UserError: the file, or a configuration that it leads to, is missing or wrong.
    """

    def __init__(self, path: str | Path, blocks: Sequence[str] = ()):
        self.path = Path(path)
        self.config = read_study(self.path)
        for block in blocks:
            if block not in self.config.blocks:
                raise UserError(f"{path}: no block '{block}'{nearest(block, self.config.blocks)}")
        self.blocks = list(blocks or self.config.blocks)
        for _ in self.runs():
            pass

    def seeds(self, block: BlockConfig) -> list[int]:
        return self.config.seeds if block.seeds is None else block.seeds

    def runs(self) -> Iterator[Run]:
        """Every run with a budget of steps, each once, though several blocks may show it."""
        seen = set()
        for block in (self.config.blocks[name] for name in self.blocks):
            for seed in self.seeds(block):  # seed by seed: a study that is cut short has whole tables
                for variant in block.variants:
                    if (key := (block.world, variant, seed)) not in seen:
                        seen.add(key)
                        yield self.run(*key)

    def timed(self) -> Iterator[tuple[str, str, str, int]]:
        """World, variant, the variant that gives the time, and seed of every run with a budget of time."""
        seen = set()
        for block in (self.config.blocks[name] for name in self.blocks):
            if block.equal_time is not None:
                for seed in self.seeds(block):
                    for variant in block.equal_time.variants:
                        key = (block.world, variant, block.equal_time.like, seed)
                        if key not in seen:
                            seen.add(key)
                            yield key

    def names(self) -> set[tuple[str, str]]:
        """World and name of every run that the file asks for, in whatever block."""
        names = set()
        for block in self.config.blocks.values():
            for seed in self.seeds(block):
                names |= {(block.world, _run_name(variant, "steps", seed)) for variant in block.variants}
                timed = block.equal_time.variants if block.equal_time else ()
                names |= {(block.world, _run_name(variant, "time", seed)) for variant in timed}
        return names

    def run(self, world: str, variant: str, seed: int, steps: int | None = None) -> Run:
        """One run; with `steps`, one whose budget is time, which so many steps fill."""
        budget: Budget = "steps" if steps is None else "time"
        name = _run_name(variant, budget, seed)
        settings = self.config.worlds[world]
        values = {**settings.set, **self.config.variants[variant].set, "seed": seed}
        if steps is not None:
            values["train.steps"] = steps
        values |= {"name": name, "output": str(self.config.folder / world)}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        try:
            config = load_config(self.path.parent / settings.config, overrides)
        except UserError as error:
            raise UserError(f"{self.path}: world '{world}', variant '{variant}': {error}") from None
        return Run(self.config.name, world, variant, seed, budget, config)


def _run_name(variant: str, budget: Budget, seed: int) -> str:
    return f"{variant}_time_seed{seed}" if budget == "time" else f"{variant}_seed{seed}"


def read_study(path: Path) -> StudyConfig:
    """Raises:
    UserError: the file is missing, no JSON, or does not fit :class:`StudyConfig`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        siblings = sorted(str(p) for p in path.parent.glob("study*.json")) if path.parent.is_dir() else []
        raise UserError(f"no study file {path}{nearest(str(path), siblings)}") from None
    try:
        return StudyConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, StudyConfig)}") from None
