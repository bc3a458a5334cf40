"""Before the first step: which run may continue in a run folder, and from where; checks of everything a user can get
wrong; the tokenizer and the resolved configuration."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import devices
from ..config import Config, are_scenes, flattened
from ..data.reading.training_set import TrainingSet, check_patterns, open_validation_shards, shard_sets
from ..data.remote.sets import remote_shards
from ..data.shards.index import open_shard
from ..data.shards.patterns import expand, without_secrets
from ..data.text.tokenizer import Tokenizer
from ..errors import UserError
from ..evaluation.datasets import open_dataset
from ..files import json_or_empty, write_json
from ..inference.formats import read, read_tokenizer
from ..models import weights
from . import checkpoint
from .data import check_bad
from .reports import import_wandb
from .summary import SCENES

# Settings that identify a run; everything else may change when it is resumed.
MADE_OF = ("seed", "model", "mixing", "loss", "schedule", "data", "train.batch", "train.optimizer")
# Parts of these that do not change what is trained.
FREE = {"loss.exchange"} | {f"data.{name}" for name in ("val_shards", "verify", "max_bad", "threads", "prefetch")}
FREE |= {f"data.cache.{name}" for name in ("folder", "size", "workers", "patience")}
SHOWN = 4  # differences in an error


def with_precision(config: Config, resume: str, device: torch.device) -> Config:
    """`config` with "auto" in ``train.precision`` replaced by the precision of the run to resume, or for a new run by
    bf16 where `device` has bf16 products, else fp32; on one rank, so that all ranks compute alike."""
    if config.train.precision != "auto":
        return config
    precision = "bf16" if devices.has_bf16_products(device) else "fp32"
    if candidates := checkpoint.find(config.run_folder, resume):
        was = json_or_empty(candidates[0].resolve().parents[1] / "config.json").get("train", {})
        precision = was.get("precision", precision)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def refuse_another(config: Config, resume: str) -> None:
    """Raise a UserError if the folder holds checkpoints of a run with other identifying settings than `config`."""
    run = config.run_folder
    was, kept = json_or_empty(run / "config.json"), checkpoint.complete(run)
    if resume == "never" or not kept or not was:
        return
    found = differences(was, config.model_dump(mode="json"))
    moved = set(found) == {"data.shards"} and SCENES not in found["data.shards"]
    if moved and TrainingSet.open(config).digest == json_or_empty(kept[-1] / checkpoint.STATE).get("order"):
        return  # the same shards in another place
    if found:
        shown = ", ".join(f"{key}: {_short(old)} → {_short(new)}" for key, (old, new) in list(found.items())[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{run} holds another run ({shown}{more}); --set name=NAME gives this run its own folder, "
            f"--resume never renames the old run's folder"
        )


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Identifying keys whose values differ, with both values; `was`: the resolved values of config.json."""
    old, new = flattened(was), flattened(now)
    for values in (old, new):
        if are_scenes(values.get("data.shards"), values.get("data.scenes.folder", "")):
            values["data.shards"] = SCENES
    free = FREE | {"data.scenes.folder", "data.scenes.val"}
    if SCENES not in (old["data.shards"], new["data.shards"]):
        free |= {key for key in new if key.startswith("data.scenes.")}
    if not new.get("model.text.vocab_size"):
        free |= {"model.text.vocab_size"}  # resolved to the tokenizer's size
    made_of = [key for key in new if key in MADE_OF or key.startswith(tuple(f"{part}." for part in MADE_OF))]
    return {key: (old[key], new[key]) for key in made_of if key in old and key not in free and old[key] != new[key]}


def finished(config: Config, resume: str) -> dict[str, Any] | None:
    """The scores of a run that has taken all steps of `config`; None: the run is not finished."""
    run = config.run_folder
    beat, was = json_or_empty(run / "heartbeat.json"), json_or_empty(run / "config.json").get("train", {})
    if resume != "auto" or not beat.get("finished") or not checkpoint.complete(run):
        return None
    whole = was.get("steps") is None and was.get("epochs") == config.train.epochs
    if config.train.steps is not None:
        whole = beat["step"] >= config.train.steps
    return json_or_empty(run / "eval.json") if whole else None


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
        checks.append(partial(_tokenizer, config, config.model.init, resuming))
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


def state_to_resume(config: Config, resume: str) -> dict[str, Any]:
    """The state of the newest undamaged checkpoint to resume from, and as "source" its path; {}: a new run.

    For a new run with --resume never, an existing run folder is renamed.
    """
    run = config.run_folder
    candidates = checkpoint.find(run, resume)
    if not candidates:
        if resume == "never" and run.exists():
            number = next(n for n in itertools.count(1) if not run.with_name(f"{run.name}.{n}").exists())
            print(f"{run} is renamed to {run.rename(run.with_name(f'{run.name}.{number}'))}", flush=True)
        return {}
    expected = {"seed": config.seed, "batch": config.train.batch, "optimizer": config.train.optimizer}
    while True:
        source = candidates.pop(0)
        try:
            state = checkpoint.read_state(source, expected)
            break
        except checkpoint.Damaged as error:
            if not candidates:
                raise
            print(f"warning: {error}; resuming from the checkpoint before it", file=sys.stderr, flush=True)
    run.mkdir(parents=True, exist_ok=True)
    if not (source / weights.TOKENIZER).is_file():
        raise UserError(f"{source} has no {weights.TOKENIZER}")
    shutil.copyfile(source / weights.TOKENIZER, run / weights.TOKENIZER)
    for later in checkpoint.complete(run):
        if int(later.name.removeprefix("step_")) > state["step"]:
            aside = later.with_name(f"aside_{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            print(f"a later checkpoint is renamed to {later.rename(aside)}", flush=True)
    return {**state, "source": source}


def prepare(config: Config, training_set: TrainingSet, resuming: bool, start: str | None = None) -> Config:
    """Train the tokenizer if necessary, resolve `config` with its size, write both into the run folder; on one rank.

    `start`: the weights that a new run starts from, whose tokenizer it takes; None: random ones. Too many bad samples
    end in a UserError.
    """
    check_bad(training_set, config)
    _refuse_few(len(training_set), config)
    if config.data.val_shards is not None:
        open_validation_shards(config.data)
    tokenizer = _tokenizer(config, start, resuming) or training_set.train_tokenizer(config.data.vocab_size)
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


def _tokenizer(config: Config, start: str | None, resuming: bool) -> Tokenizer | None:
    """An existing tokenizer; None: one must be trained on the captions."""
    if resuming:  # token ids must keep their meaning
        return Tokenizer.load(config.run_folder / weights.TOKENIZER)
    if config.data.tokenizer is not None:
        return read_tokenizer(config.data.tokenizer)
    if start is not None:
        tokenizer = read(start).tokenizer
        if tokenizer is None:
            raise UserError(f"model.init: {config.model.init} has no tokenizer; name one by data.tokenizer")
        return tokenizer
    return None


def _short(value: Any) -> str:
    text = without_secrets(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}…"
