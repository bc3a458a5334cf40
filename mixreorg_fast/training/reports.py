"""The reports of a run: what the steps since the last report measured, over all ranks, and where they are written."""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config, flattened
from ..data.shards.scan import Bad
from ..errors import UserError
from ..files import write_json, write_text
from ..ranks import Ranks, all_gather, gather_objects, on_main, sum_over_ranks
from .data import BadSamples
from .summary import expected


class Reports:
    """Collects measures on every rank. As a context manager, it lets rank 0 write them to a :class:`MetricsLog`.

    Sums stay on the device, so that a step does not wait for them.

    Args:
        start: the step that the run starts or resumes at. steps: of the whole run.
    """

    def __init__(self, config: Config, ranks: Ranks, bad_samples: BadSamples, start: int, steps: int):
        self._config, self._ranks, self._bad_samples = config, ranks, bad_samples
        self._start, self._steps = start, steps
        self._log: MetricsLog | None = None
        self._told_time = False
        # The first steps compile and record CUDA graphs; their speed says nothing of the steps to come.
        self._steady_from = start + 3 if config.compiles(ranks.device.type) else start
        self._own_time, self._rank_times = Stopwatch(ranks.device), RankTimes(ranks, config.log.slow_rank)
        self.restart()

    def __enter__(self) -> Reports:
        on_main(self._open)
        return self

    def _open(self) -> None:
        self._log = MetricsLog(self._config.run_folder, self._start, self._steps, self._config.log.wandb)

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._log.close()

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self._log is not None:
            tqdm.write(text, file=sys.stderr)

    def restart(self) -> None:
        """Begin the next report's steps and time here."""
        self._sums: dict[str, Tensor] = {}
        self._micro_steps = self._steps_since = 0
        self._began, self._waited = time.perf_counter(), 0.0
        self._own_time.restart()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the wait for a micro-batch; this rank's own time begins here."""
        self._own_time.start()
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def at_exchange(self) -> None:
        """End this rank's own time, at the first exchange between ranks."""
        self._own_time.stop()

    def add(self, losses: Sequence[dict[str, Tensor]]) -> None:
        """Count a step, with the losses and measures of each micro-step; a skipped step has none."""
        for each in losses:
            for name, value in each.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micro_steps += len(losses)
        self._steps_since += 1
        if self._log is not None:
            self._log.bar.update()

    def write(self, step: int, bad: list[Bad], measures: dict[str, float | None]) -> None:
        """Report the steps since the last report, at the run's `step`; call on every rank.

        `bad` are the bad samples that this rank has found; more than ``data.max_bad`` of all end in a UserError.
        `measures` are further values of this step, the same on every rank.
        """
        means: dict[str, float] = {}  # over all ranks and micro-steps; empty if every step was skipped
        if self._micro_steps:
            sums = torch.stack(list(self._sums.values())).float() / self._micro_steps
            means = dict(zip(self._sums, (sum_over_ranks(sums) / self._ranks.size).tolist(), strict=True))
        found = self._bad_samples.count(bad)
        seconds, waited, steps = time.perf_counter() - self._began, self._waited, self._steps_since
        times = self._rank_times.gather(self._own_time.seconds() / steps)
        self.restart()
        if self._log is None:
            return
        batch = self._config.train.batch
        images_per_s, samples = steps * batch / seconds, step * batch
        if self._ranks.device.type == "cuda":
            peak_memory = torch.cuda.max_memory_allocated(self._ranks.device)
        else:
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        values: dict[str, Any] = {
            "samples": samples,
            **means,
            **measures,
            "images_per_s": images_per_s,
            "data_wait": waited / seconds,
            "rank_seconds": times,
            "peak_memory_mb": peak_memory / 2**20,
            "bad_samples": found,
        }
        self._log.write(step, values)
        losses = {name: value for name, value in means.items() if name.startswith("loss")}
        left = None if step - steps < self._steady_from else (self._steps - step) * batch / images_per_s
        self._log.show(step, {**losses, "images/s": images_per_s}, left)
        if left is not None and not self._told_time and step < self._steps:
            self._told_time = True
            self.say(expected(left, self._steps - step))
        if (ended := self._bad_samples.remark(samples)) is not None:
            self.say(ended)
        if (slow := self._rank_times.remark(times)) is not None:
            self.say(f"step {step}: {slow}")

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Report the scores of a validation."""
        if self._log is not None and figures:
            self._log.write(step, {"validation": figures})
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))


class Stopwatch:
    """Sums intervals of a device's time; on a GPU by events, without waiting for them."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self._marks: list[Any] = []  # beginning and end of each interval

    def start(self) -> None:
        """Begin an interval, unless one has begun."""
        if len(self._marks) % 2 == 0:
            self._mark()

    def stop(self) -> None:
        """End the interval, if one has begun."""
        if len(self._marks) % 2:
            self._mark()

    def seconds(self) -> float:
        """The sum of all intervals since the last restart; waits for the GPU to finish the last one."""
        intervals = list(zip(self._marks[::2], self._marks[1::2], strict=False))
        if not self._cuda:
            return sum(end - begin for begin, end in intervals)
        if intervals:
            intervals[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in intervals) / 1000

    def _mark(self) -> None:
        self._marks.append(torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter())
        if self._cuda:
            self._marks[-1].record()


class RankTimes:
    """Compares the ranks' times to find a slow one; every rank makes one.

    Ranks end a step together, so their steps take equally long. A slow rank takes longer until the step's first
    exchange between ranks: reading data and most of the forward pass. Under ZeRO-3, which exchanges parameters in the
    forward pass, only the time for reading data shows it.

    Args:
        slow: a rank that is slower than the mean by more than this share, in two reports in a row, is named.
    """

    def __init__(self, ranks: Ranks, slow: float):
        self._ranks, self._slow = ranks, slow
        self._hosts = gather_objects(socket.gethostname())
        self._suspect = self._named = -1

    def gather(self, seconds: float) -> dict[str, Any]:
        """``min``, ``mean`` and ``max`` of the ranks' seconds, the ``slowest`` rank and its ``host``; call on every
        rank."""
        times = all_gather(torch.tensor([seconds], dtype=torch.float64, device=self._ranks.device)).tolist()
        slowest, mean = times.index(max(times)), sum(times) / len(times)
        return {"min": min(times), "mean": mean, "max": max(times), "slowest": slowest, "host": self._hosts[slowest]}

    def remark(self, times: dict[str, Any]) -> str | None:
        """A line that names a rank that has become slow; None if none has, or if the last line named it."""
        rank = times["slowest"] if times["max"] > (1 + self._slow) * times["mean"] else -1
        before, self._suspect = self._suspect, rank
        if rank != before or rank == self._named:
            return None
        self._named = rank
        if rank < 0:
            return None
        return (
            f"rank {rank} on {times['host']} is slow: {times['max']:.3g} s of a step until the first exchange, "
            f"{times['max'] / times['mean'] - 1:.0%} more than the ranks' mean (log.slow_rank)"
        )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class MetricsLog:
    """Writes a run's measures to ``metrics.jsonl``, TensorBoard and Weights & Biases, and shows them in the progress
    bar; only rank 0 makes one.

    Args:
        start: the step that the run starts or resumes at; lines of later steps, from before an interruption, are
            dropped. steps: of the whole run. wandb: the Weights & Biases project to report to.
    Raises:
        UserError: Weights & Biases is not installed or cannot be reached.
    """

    def __init__(self, run: Path, start: int, steps: int, wandb: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self._wandb = _start_wandb(run, wandb) if wandb is not None else None
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines if _step(line) <= start))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        # A terminal gets a bar; a log file gets a line per report.
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of ``metrics.jsonl``; numbers also go to TensorBoard and wandb, nested ones by path."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: value for name, value in flattened(values, "/").items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def show(self, step: int, values: dict[str, float], seconds_left: float | None) -> None:
        """Show the losses and the speed in the progress bar; without a bar, print them as a line.

        `seconds_left`: None in the first reports, whose speed includes the time of compilation.
        """
        text = " ".join(f"{name.removeprefix('loss_')} {value:.4g}" for name, value in values.items())
        if self.bar.disable:
            if seconds_left is not None:
                text += f" | {tqdm.format_interval(seconds_left)} left"
            print(f"step {step}/{self.bar.total} {text}", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(text)

    def close(self) -> None:
        self.bar.close()
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def import_wandb() -> Any:
    """The wandb module, or a UserError where it is not installed."""
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
    # A resumed run may have another learning rate or number of steps, so its configuration may change.
    options = {"config": json.loads((run / "config.json").read_text()), "allow_val_change": True}
    try:
        online = wandb.init(**known, name=run.name, resume="allow", dir=str(run), **options)
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
