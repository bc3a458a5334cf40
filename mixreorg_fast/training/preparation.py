"""What stands before the first step: data in place, tokenizer, everything a user can get wrong found early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..config import Config, EvalDatasetConfig
from ..data.reading.loader import shard_sets, tokenizer_for, training_shards
from ..data.scenes.scenes import ensure_scenes
from ..data.shards.shards import expand, open_shard, open_shards
from ..data.text.tokenizer import Tokenizer
from ..errors import UserError
from ..evaluation.datasets import open_dataset
from ..files import write_json
from ..models import weights
from .data import check_bad
from .metrics import import_wandb

# Like GroupViT's, set for the data: at 0.95, VOC's, little but the surest segment is no background, and that may be one
# without a pixel. Both methods score best at 0.2 or 0.3.
SCENES_THRESHOLD = 0.3


@dataclass(frozen=True)
class Prepared:
    """A configuration with every default that depends on data filled in."""

    config: Config
    samples: int  # in the training set


def check_inputs(config: Config, resuming: bool, world_size: int = 1) -> None:
    """See that all which `config` names is there, before shards are verified, which may take hours. Runs on one rank.

    Raises:
        UserError: all that is missing or does not fit, in one line.
    """
    checks: list[Callable[[], object]] = [partial(config.micro_batch, world_size)]
    if config.data.shards is not None:
        checks += [partial(expand, pattern) for pattern, _ in shard_sets(config.data)]
    if config.data.val_shards is not None:
        checks.append(partial(expand, config.data.val_shards))
    checks.append(partial(_check_batch, config, world_size))
    checks += [partial(open_dataset, entry.dataset, entry.root, entry.split) for entry in config.eval.datasets]
    if not resuming and (config.data.tokenizer or config.model.init):
        checks.append(partial(_tokenizer, config, resuming))
    if config.log.wandb is not None:
        checks.append(import_wandb)
    problems: dict[str, None] = {}  # a pattern without shards is found twice
    for check in checks:
        try:
            check()
        except UserError as error:
            problems[str(error)] = None
    if len(problems) > 1:
        listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
        raise UserError(f"{len(problems)} mistakes: {listed}")
    if problems:
        raise UserError(*problems)


def prepare(config: Config, resuming: bool) -> Prepared:
    """Complete `config`, make the embedded data and the tokenizer where needed, write ``config.json``.

    Runs on one rank. Raises:
        UserError: too many samples of the training set cannot be used.
    """
    if config.data.shards is None:
        config = _with_scenes(config)
    shards = training_shards(config)
    check_bad(shards, config)
    _check_batch(config)
    if config.data.val_shards is not None:
        open_shards(config.data.val_shards)
    tokenizer = _tokenizer(config, resuming)
    text = config.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
    config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
    run = config.run_folder
    run.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run)
    write_json(run / "config.json", config.model_dump(mode="json"))
    return Prepared(config, len(shards))


def _check_batch(config: Config, world_size: int = 1) -> None:
    """
    Raises:
        UserError: there are no shards, or fewer samples than a batch.
    """
    if config.data.shards is None:
        samples = config.data.scenes.train
    else:
        samples = 0
        for path in (path for pattern, _ in shard_sets(config.data) for path in expand(pattern)):
            samples += len(open_shard(path).samples)
            if samples >= config.train.batch:  # the first shards suffice: to index all is the work of all ranks
                return
    if samples < config.train.batch:
        unit = config.batch_unit(world_size)
        fits = f"nearest: {samples // unit * unit}" if samples >= unit else f"at least {unit} are needed"
        raise UserError(f"train.batch {config.train.batch} is more than the {samples} samples of data.shards ({fits})")


def _with_scenes(config: Config) -> Config:
    """The embedded scenes as training, retrieval and, unless others are named, evaluation data."""
    scenes = ensure_scenes(config.data.scenes)
    shards, pairs = (list(map(str, paths)) for paths in (scenes.train, scenes.val))
    data = config.data.model_copy(update={"shards": shards, "val_shards": config.data.val_shards or pairs})
    evaluation = config.eval
    if not evaluation.datasets:
        folders = {"scenes": scenes.evaluation, "scenes_unseen": scenes.unseen, "scenes_small": scenes.small}
        datasets = [
            EvalDatasetConfig(name=name, root=str(folder), background_threshold=SCENES_THRESHOLD)
            for name, folder in folders.items()
        ]
        evaluation = evaluation.model_copy(update={"datasets": datasets})
    return config.model_copy(update={"data": data, "eval": evaluation})


def _tokenizer(config: Config, resuming: bool) -> Tokenizer:
    if resuming:  # ids must go on meaning what they meant
        return Tokenizer.load(config.run_folder / weights.TOKENIZER)
    if config.model.init is not None and config.data.tokenizer is None:
        return Tokenizer.load(weights.find_weights(Path(config.model.init)) / weights.TOKENIZER)
    return tokenizer_for(config)
