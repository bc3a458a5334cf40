"""Which run may continue in a run folder, and from which checkpoint: data, model, method and seed must not change."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from ..config import Config, are_scenes, flattened
from ..data.reading.training_set import TrainingSet
from ..errors import UserError
from ..files import json_or_empty
from ..models import weights
from . import checkpoint

# Settings that identify a run; everything else may change when it is resumed.
MADE_OF = ("seed", "model", "mixing", "loss", "schedule", "data", "train.batch")
# Parts of these that do not change what is trained.
FREE = {"loss.exchange"} | {f"data.{name}" for name in ("val_shards", "verify", "max_bad", "threads", "prefetch")}
FREE |= {f"data.cache.{name}" for name in ("folder", "size", "workers", "patience")}
SHOWN = 4  # differences in an error
SCENES = "the embedded scenes"


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
        if are_scenes(values.get("data.shards"), values["data.scenes.folder"]):
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
    if config.train.steps is not None:
        whole = beat["step"] >= config.train.steps
    else:
        whole = was.get("steps") is None and was.get("epochs") == config.train.epochs
    return json_or_empty(run / "eval.json") if whole else None


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
    expected = {"seed": config.seed, "batch": config.train.batch}
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


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
