"""What a run reports: ``metrics.jsonl``, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class MetricsLog:
    """Writes a run's measures as it goes; only rank 0 makes one.

    Args:
        run: the run folder. start: the step the run (re)starts at; lines after it, of a run that went further before
            it was cut, are dropped. steps: of the whole run.
    """

    def __init__(self, run: Path, start: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        # A terminal gets a bar; a log file gets a line per report.
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self._steps = steps

    def step(self) -> None:
        self._bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``; numbers also go to TensorBoard (nested ones with their path)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in _flatten(values):
            self._board.add_scalar(name, value, step)

    def show(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """The loss parts and the speed, in the bar or as a line."""
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


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that was cut off when the run was
        return float("inf")


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat.append((prefix + name, value))
    return flat
