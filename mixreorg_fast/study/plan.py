"""A study's file and its runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..config import Config, NonNegative, Section, load_config, read_object, validated
from ..errors import UserError, nearest

Budget = Literal["steps", "time"]
Overrides = dict[str, Any]  # {"train.steps": 900}: what `--set` takes, as JSON


class VariantConfig(Section):
    """One row of the table: a readable name, and the differences from the dataset's configuration."""

    about: str
    set: Overrides = {}


class DatasetConfig(Section):
    """A dataset to train on: a training configuration, relative to the study's file."""

    config: str
    set: Overrides = {}


class EqualTimeConfig(Section):
    """Variants to train once more, for as many steps as fit into the time of `like`."""

    like: str
    variants: Annotated[list[str], Field(min_length=1)]


class BlockConfig(Section):
    """Runs of one table."""

    dataset: str
    variants: Annotated[list[str], Field(min_length=1)]
    equal_time: EqualTimeConfig | None = None
    seeds: list[NonNegative] | None = Field(None, description="null: the study's")


class StudyConfig(Section):
    """A study. The other variants of a block are compared with its first."""

    name: str
    output: str = Field("runs", description="folder of study folders")
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0, 1, 2]
    datasets: dict[str, DatasetConfig]
    variants: dict[str, VariantConfig]
    blocks: dict[str, BlockConfig]
    pictures: NonNegative = Field(3, description="photos in a picture of all variants; 0: no pictures, no curves")

    def problems(self) -> Iterator[str]:
        for name, block in self.blocks.items():
            of_time = block.equal_time
            named = [*block.variants, *((*of_time.variants, of_time.like) if of_time else ())]
            for variant in named:
                if variant not in self.variants:
                    yield f"block '{name}': no variant '{variant}'{nearest(variant, self.variants)}"
                if variant not in block.variants:
                    yield f"block '{name}': equal_time needs '{variant}' among the block's variants"
            if block.dataset not in self.datasets:
                yield f"block '{name}': no dataset '{block.dataset}'{nearest(block.dataset, self.datasets)}"


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    study: str
    dataset: str  # the key in `datasets` of the dataset that the run trains on
    variant: str
    seed: int
    budget: Budget
    config: Config  # complete, with a run folder for this run alone

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def request(self) -> Path:
        """The configuration file that the run is started with; it identifies the run later."""
        return self.folder.with_name(f"{self.folder.name}.json")


class Study:
    """A study's file, read and checked: the configurations of all runs are valid.

    Args:
        blocks: only these blocks; none: all.
    Attributes:
        runs: every run with a budget of steps, once, also if several blocks contain it.
        timed: dataset, variant, the variant whose time is the budget, and seed of every run with a budget of time.
    Raises:
        UserError: the file or a configuration that it names is missing or wrong.
    """

    def __init__(self, path: str | Path, blocks: Sequence[str] = ()):
        self.path = Path(path)
        self.config = validated(StudyConfig, _with_new_keys(read_object(self.path, "study"), str(path)), str(path))
        for block in blocks:
            if block not in self.config.blocks:
                raise UserError(f"{path}: no block '{block}'{nearest(block, self.config.blocks)}")
        runs, self.timed = self._keys(blocks or self.config.blocks)
        self.runs = [self.run(*key) for key in runs]

    def _keys(self, blocks: Iterable[str]) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, str, int]]]:
        """Dataset, variant and seed of the runs with a budget of steps in `blocks`, once each; and :attr:`timed`."""
        runs, timed = [], []
        for block in map(self.config.blocks.__getitem__, blocks):
            # Seed by seed: an interrupted study has complete tables of the first seeds.
            for seed in self.config.seeds if block.seeds is None else block.seeds:
                runs += [(block.dataset, variant, seed) for variant in block.variants]
                if (of_time := block.equal_time) is not None:
                    timed += [(block.dataset, variant, of_time.like, seed) for variant in of_time.variants]
        return list(dict.fromkeys(runs)), list(dict.fromkeys(timed))

    def names(self) -> set[tuple[str, str]]:
        """Dataset and name of every run of the file, in any block."""
        runs, timed = self._keys(self.config.blocks)
        names = {(dataset, _run_name(variant, "steps", seed)) for dataset, variant, seed in runs}
        return names | {(dataset, _run_name(variant, "time", seed)) for dataset, variant, _, seed in timed}

    def run(self, dataset: str, variant: str, seed: int, steps: int | None = None) -> Run:
        """One run; `steps`: those that fit into its budget of time; None: the budget is the configuration's steps."""
        budget: Budget = "steps" if steps is None else "time"
        settings = self.config.datasets[dataset]
        values = {**settings.set, **self.config.variants[variant].set, "seed": seed}
        values |= {} if steps is None else {"train.steps": steps}
        folder = Path(self.config.output) / self.config.name / dataset
        values |= {"name": _run_name(variant, budget, seed), "output": str(folder)}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        try:
            config = load_config(self.path.parent / settings.config, overrides)
        except UserError as error:
            raise UserError(f"{self.path}: dataset '{dataset}', variant '{variant}': {error}") from None
        return Run(self.config.name, dataset, variant, seed, budget, config)


def _with_new_keys(values: dict[str, Any], path: str) -> dict[str, Any]:
    """The values of a study's file, with the keys "worlds" and "world" by their present names."""
    if "worlds" not in values:
        return values
    print(f"warning: {path}: 'worlds' and 'world' are now 'datasets' and 'dataset'", file=sys.stderr, flush=True)
    new = {"worlds": "datasets", "world": "dataset"}
    return json.loads(json.dumps(values), object_hook=lambda part: {new.get(key, key): part[key] for key in part})


def _run_name(variant: str, budget: Budget, seed: int) -> str:
    return f"{variant}_time_seed{seed}" if budget == "time" else f"{variant}_seed{seed}"
