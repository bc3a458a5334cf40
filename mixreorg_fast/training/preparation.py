"""Before the first step: checks of everything a user can get wrong, the tokenizer, the resolved configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..config import Config
from ..data.reading.training_set import TrainingSet, check_patterns, open_validation_shards, shard_sets
from ..data.remote.sets import remote_shards
from ..data.shards.index import open_shard
from ..data.shards.patterns import expand
from ..data.text.tokenizer import Tokenizer
from ..errors import UserError
from ..evaluation.datasets import open_dataset
from ..files import write_json
from ..inference.formats import read
from ..models import weights
from .data import check_bad
from .reports import import_wandb


def check_inputs(config: Config, resuming: bool, world_size: int = 1) -> None:
    """Check everything that `config` names before shards are verified, which may take hours; on one rank.

    All problems are in the one line of a UserError.
    """
    data = config.data
    patterns = [pattern for pattern, _ in shard_sets(data)] if data.shards is not None else []
    checks: list[Callable[[], object]] = [
        partial(config.micro_batch, world_size),
        *(partial(check_patterns, pattern, data) for pattern in (*patterns, data.val_shards) if pattern is not None),
        partial(_check_batch, config, patterns, world_size),
        *(partial(open_dataset, entry.dataset, entry.root, entry.split) for entry in config.eval.datasets),
    ]
    if not resuming:
        checks.append(partial(_tokenizer, config, resuming))
    if config.log.wandb is not None:
        checks.append(import_wandb)
    problems: dict[str, None] = {}  # a pattern without shards is reported twice
    for check in checks:
        try:
            check()
        except UserError as error:
            problems[str(error)] = None
    if problems:
        numbered = (f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
        raise UserError(f"{len(problems)} mistakes: {'; '.join(numbered)}" if len(problems) > 1 else "".join(problems))


def prepare(config: Config, training_set: TrainingSet, resuming: bool) -> Config:
    """Train the tokenizer if necessary, resolve `config` with its size, write both into the run folder; on one rank.

    Too many bad samples end in a UserError.
    """
    check_bad(training_set, config)
    _refuse_few(len(training_set), config)
    if config.data.val_shards is not None:
        open_validation_shards(config.data)
    tokenizer = _tokenizer(config, resuming) or training_set.train_tokenizer(config.data.vocab_size)
    text = config.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
    config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
    config.run_folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(config.run_folder)
    write_json(config.run_folder / "config.json", config.model_dump(mode="json"))
    return config


def _check_batch(config: Config, patterns: list, world_size: int) -> None:
    """Raise a UserError if there are no shards, or fewer samples than a batch. Remote ones are counted later."""
    if any(remote_shards(pattern, config.data.cache) for pattern in patterns):
        return
    samples = config.data.scenes.train if config.data.shards is None else 0
    for path in (path for pattern in patterns for path in expand(pattern)):
        samples += len(open_shard(path).samples)
        if samples >= config.train.batch:  # the first shards suffice; all ranks together index the others
            return
    _refuse_few(samples, config, world_size)


def _refuse_few(samples: int, config: Config, world_size: int = 1) -> None:
    if samples < config.train.batch:
        unit = config.batch_unit(world_size)
        fits = f"nearest: {samples // unit * unit}" if samples >= unit else f"at least {unit} are needed"
        raise UserError(f"train.batch {config.train.batch} is more than the {samples} samples of data.shards ({fits})")


def _tokenizer(config: Config, resuming: bool) -> Tokenizer | None:
    """An existing tokenizer; None: one must be trained on the captions."""
    if resuming:  # token ids must keep their meaning
        return Tokenizer.load(config.run_folder / weights.TOKENIZER)
    if config.data.tokenizer is not None:
        return Tokenizer.load(config.data.tokenizer)
    if config.model.init is not None:
        tokenizer = read(config.model.init).tokenizer
        if tokenizer is None:
            raise UserError(f"model.init: {config.model.init} has no tokenizer; name one by data.tokenizer")
        return tokenizer
    return None
