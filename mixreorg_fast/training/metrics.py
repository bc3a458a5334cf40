"""Where a run reports to: ``metrics.jsonl``, TensorBoard, Weights & Biases, the progress bar."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from ..files import write_json, write_text


class MetricsLog:
    """Writes a run's measures; only rank 0 makes one.

    Args:
        run: the run folder. start: the step that the run starts or resumes at; lines of later steps, from before an
            interruption, are dropped. steps: of the whole run.
        wandb: the Weights & Biases project to report to; None: none.
    Raises:
        UserError: Weights & Biases is not installed or cannot be reached.
    """

    def __init__(self, run: Path, start: int, steps: int, wandb: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self._wandb = _start_wandb(run, wandb) if wandb is not None else None

        path = run / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        # A terminal gets a bar; a log file gets a line per report.
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self._steps = steps

    def step(self) -> None:
        self._bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of ``metrics.jsonl``; numbers also go to TensorBoard and wandb, nested ones by path."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = _flatten(values)
        for name, value in numbers:
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**dict(numbers), "step": step})

    def show(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """Show the losses and the speed in the progress bar, or print them as a line."""
        text = " ".join(f"{name.removeprefix('loss_')} {value:.4g}" for name, value in values.items())
        if self._bar.disable:
            left = tqdm.format_interval(seconds_left)
            print(f"step {step}/{self._steps} {text} | {left} left", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def import_wandb() -> Any:
    """The wandb module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log.wandb needs Weights & Biases: pip install wandb ({error})") from None
    return wandb


def _start_wandb(run: Path, project: str) -> Any:
    """The run at Weights & Biases that belongs to this run folder, whose ``wandb.json`` holds its id."""
    wandb = import_wandb()
    memory = run / "wandb.json"
    known = json.loads(memory.read_text()) if memory.exists() else {"project": project, "id": secrets.token_hex(8)}
    if known["project"] != project:
        raise UserError(f"{run} reports to the project {known['project']}; log.wandb is now {project}")
    try:
        online = wandb.init(
            **known,
            name=run.name,
            resume="allow",
            dir=str(run),
            config=json.loads((run / "config.json").read_text()),
            allow_val_change=True,  # a resumed run may have another learning rate or number of steps
        )
    except wandb.Error as error:
        raise UserError(f"log.wandb: {error} (WANDB_MODE=offline keeps the reports in {run / 'wandb'})") from None
    write_json(memory, known)
    # A metric of ours counts the steps: after resuming they start lower, which wandb's own counter cannot do.
    online.define_metric("*", step_metric="step")
    return online


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that an interruption has truncated
        return float("inf")


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat.append((prefix + name, value))
    return flat
