"""Checkpoints: folders ``checkpoints/step_00001000``, written atomically, readable by any number of ranks.

Each holds the portable weights (fp32: the master weights), Adam's moments by parameter name, and ``state.json``: step,
samples consumed, settings that must not change, and the SHA-256 of every file. All randomness of a run is a function of
the seed and the number of samples consumed, so there is no other state to save. DeepSpeed's own checkpoints cannot be
loaded with another number of ranks or another ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.text.tokenizer import Tokenizer
from ..errors import UserError, nearest
from ..files import atomic_path, checksum, sync, write_json
from ..models import GroupViT, weights
from ..ranks import on_main, rank
from .distributed import import_deepspeed

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
_BACKBONE = "backbone."


class Damaged(UserError):
    """A checkpoint with missing or altered files."""


# ---------------------------------------------------------------------- from and to the engine


def portable_state(engine: Any) -> dict[str, Tensor]:
    """The backbone's whole state dict on the CPU (gathered under ZeRO-3); call on every rank."""
    backbone: GroupViT = engine.module.backbone
    state = {key: value.detach().cpu().clone() for key, value in backbone.named_buffers()}
    return state | dict(_parameters(engine, backbone))


def _parameters(engine: Any, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters by name, copied to the CPU."""
    for name, parameter in module.named_parameters():
        with import_deepspeed().zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            yield name, parameter.detach().cpu().clone()


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """Adam's moments, ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and the parameters outside the backbone,
    ``parameter/NAME``. On other ranks than 0 the result is empty; call on every rank."""
    whole: Any = import_deepspeed().utils.safe_get_full_optimizer_state
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        for key in MOMENTS:
            stage = engine.zero_optimization_stage()
            value = whole(parameter, key) if stage else engine.optimizer.state[parameter][key]
            if rank() == 0:
                state[f"{key}/{name}"] = value.detach().cpu().clone().reshape(_shape(parameter))
    for name, value in _parameters(engine, engine.module):
        if rank() == 0 and not name.startswith(_BACKBONE):
            state[f"parameter/{name}"] = value
    return state


def restore_weights(module: Any, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into the training module, before the engine takes its parameters.

    Weights of another model raise a UserError.
    """
    weights.fill(module.backbone, weights.read_tensors(checkpoint / weights.WEIGHTS), checkpoint)
    others = {f"parameter/{name}": p for name, p in module.named_parameters() if not name.startswith(_BACKBONE)}
    saved = _saved(checkpoint, {name: parameter.shape for name, parameter in others.items()}) if others else {}
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(saved[name])


def start_moments(engine: Any) -> None:
    """Create the optimizer's moments, all zero; otherwise it creates them in its first step."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        owned = list(engine.module.parameters())
    else:
        owned = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    adam = _adam(engine)
    for tensor in owned:
        device = tensor.device if adam.defaults["fused"] else "cpu"
        adam.state[tensor] = {"step": torch.zeros((), device=device)} | {k: torch.zeros_like(tensor) for k in MOMENTS}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()  # links parameters to their moments


def restore_moments(engine: Any, checkpoint: Path, updates: int) -> None:
    """Load Adam's moments after :func:`start_moments`; call on every rank.

    `updates`: the optimizer steps that produced the moments. Moments of another model raise a UserError.
    """
    stage, utils = engine.zero_optimization_stage(), import_deepspeed().utils
    for state in _adam(engine).state.values():
        state["step"].fill_(updates)
    moments = [(f"{key}/{name}", key, p) for name, p in engine.module.named_parameters() for key in MOMENTS]
    saved = _saved(checkpoint, {name: _shape(parameter) for name, _, parameter in moments})
    for name, key, parameter in moments:
        value = saved[name].to(engine.device)
        if stage == 0:
            engine.optimizer.state[parameter][key].copy_(value)
        elif stage == 3:  # every rank holds a part of equal length, the last one padded
            part, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
            padded = nn.functional.pad(value.flatten(), (0, part * group.size() - value.numel()))
            utils.safe_set_local_optimizer_state(parameter, padded.split(part)[group.rank()], key)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty


def _saved(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's optimizer, of these names and shapes."""
    path = checkpoint / OPTIMIZER
    saved = {name: value for name, value in weights.read_tensors(path).items() if name in shapes}
    weights.check_names(saved.keys(), shapes.keys(), str(path))
    weights.check_shapes(saved, shapes, str(path))
    return saved


# ---------------------------------------------------------------------- folders


def save(run: Path, engine: Any, state: dict[str, Any], keep: int, tokenizer: Tokenizer) -> Path:
    """Write ``checkpoints/step_*`` atomically and remove all but the newest `keep`; call on every rank.

    `state` holds JSON values to restore, among them the ``step``. A full disk ends in a UserError; earlier checkpoints
    stay.
    """
    tensors, moments = portable_state(engine), optimizer_state(engine)
    target = run / "checkpoints" / f"step_{state['step']:08d}"

    def write() -> None:
        for stale in target.parent.glob(".*.partial"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        try:
            with atomic_path(target) as partial:
                partial.mkdir()
                weights.write_files(engine.module.backbone, partial, tensors, engine.module.config.inference)
                tokenizer.save(partial)
                save_file(moments, partial / OPTIMIZER)
                content = {**state, "files": {p.name: checksum(p) for p in sorted(partial.iterdir())}}
                write_json(partial / STATE, {**content, "sha256": _digest_of(content)})
                for path in (*partial.iterdir(), partial):
                    sync(path)
            sync(target.parent)
        except (OSError, SafetensorError) as error:
            before = complete(run)
            rest = f"{before[-1]} is intact, the same command resumes from it" if before else "no earlier one exists"
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise UserError(f"checkpoint {target} cannot be written ({reason}); {rest}") from None
        for old in complete(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    on_main(write)
    return target


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/step_*/{STATE}"))


def find(run: Path, resume: str) -> list[Path]:
    """The checkpoints that ``--resume auto|never|PATH`` allows to resume from, the newest first; []: a new run.

    A PATH that is neither a checkpoint nor a run folder with one ends in a UserError.
    """
    if resume in ("never", "auto"):
        return complete(run)[::-1] if resume == "auto" else []
    path = Path(resume)
    if (path / STATE).is_file():
        return [path]
    if found := complete(path):
        return found[::-1]
    raise UserError(f"--resume {resume}: no complete checkpoint there{nearest(resume, map(str, complete(run)))}")


def read_state(checkpoint: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose files have the SHA-256 noted there; else :class:`Damaged`.

    Another value of a setting in `expected` ends in a UserError; older checkpoints do not name all of them.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_bytes())
        digest = state.pop("sha256")
        files = state["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: not the state of a checkpoint: {error!r}") from None
    if digest != _digest_of(state):
        raise Damaged(f"{path} is damaged: its SHA-256 is not the one noted in it")
    for name, digest in files:
        if not (checkpoint / name).is_file():
            raise Damaged(f"{checkpoint / name} is missing")
        if checksum(checkpoint / name) != digest:
            raise Damaged(f"{checkpoint / name} is damaged: its SHA-256 is not the one noted in {STATE}")
    for key, value in expected.items():
        if state.get(key, value) != value:
            raise UserError(f"{checkpoint} was written with {key} {state[key]}; this run has {key} {value}")
    return state


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
