"""Checkpoints: complete folders or none, ``checkpoints/step_00001000``.

Each holds DeepSpeed's own state, ``state.json`` (step, samples consumed, settings that must not change) and the
portable weights. The position in the data is the number of samples consumed: all randomness of a run is a function of
that and the seed, so there is no other state to save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError, nearest
from ..files import write_json
from ..models import GroupViT, weights
from .distributed import World, import_deepspeed

STATE = "state.json"
_ENGINE = "deepspeed"


def portable_state(engine: Any) -> dict[str, torch.Tensor]:
    """The backbone's whole state dict on the CPU (gathered under ZeRO-3); call on every rank."""
    backbone: GroupViT = engine.module.backbone
    if engine.zero_optimization_stage() < 3:
        return {key: value.detach().cpu().clone() for key, value in backbone.state_dict().items()}
    state = {key: value.detach().cpu().clone() for key, value in backbone.named_buffers()}
    deepspeed = import_deepspeed()
    for name, parameter in backbone.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().cpu().clone()
    return state


def save(run: Path, step: int, engine: Any, world: World, state: dict[str, Any], keep: int) -> Path:
    """Write ``checkpoints/step_*`` atomically and remove all but the newest `keep`; call on every rank."""
    target = run / "checkpoints" / f"step_{step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if world.size > 1:
        dist.barrier()
    engine.save_checkpoint(str(partial), tag=_ENGINE)
    tensors = portable_state(engine)
    if world.is_main:
        weights.write_files(engine.module.backbone, partial, tensors)
        write_json(partial / STATE, {"step": step, **state})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in complete(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if world.size > 1:
        dist.barrier()
    return target


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/step_*/{STATE}"))


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume auto|never|PATH`` names; None: start anew.

    Raises:
        UserError: PATH is no checkpoint and no run folder with one.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = complete(run)
        return found[-1] if found else None
    path = Path(resume)
    if (path / STATE).is_file():
        return path
    found = complete(path)
    if not found:
        known = [str(p) for p in complete(run)]
        raise UserError(f"--resume {resume}: no complete checkpoint there{nearest(resume, known) if known else ''}")
    return found[-1]


def read_state(checkpoint: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """``state.json`` of a checkpoint, refused where a setting in `expected` differs.

    Raises:
        UserError: the file is damaged, or the checkpoint was made with another setting.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text())
        state["step"], state["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE}: not the state of a checkpoint: {error!r}") from None
    for key, value in expected.items():
        if state.get(key) != value:
            raise UserError(f"{checkpoint} was written with {key} {state.get(key)}; this run has {key} {value}")
    return state


def restore(engine: Any, checkpoint: Path) -> None:
    """Load DeepSpeed's state of a checkpoint; call on every rank.

    Raises:
        UserError: it does not load.
    """
    path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE)
    if path is None:
        raise UserError(f"{checkpoint}: DeepSpeed found no state to load in it")
