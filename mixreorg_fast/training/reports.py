"""The reports of a run: what the steps since the last report measured, over all ranks."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data.shards.bad import Bad
from ..ranks import Ranks, mean_over_ranks, on_main
from .data import BadSamples
from .metrics import MetricsLog
from .summary import expected
from .timing import RankTimes, Stopwatch


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
            self._log.say(text)

    def restart(self) -> None:
        """Begin the next report's steps and time here."""
        self._sums: dict[str, Tensor] = {}
        self._micro_steps = self._steps_since = 0
        self._began, self._waited = time.perf_counter(), 0.0
        self._own_time.restart()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the wait for a micro-batch; this rank's own time begins here and ends at :meth:`at_exchange`."""
        self._own_time.start()
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def at_exchange(self) -> None:
        """Note that this rank has come to the first exchange between ranks."""
        self._own_time.stop()

    def add(self, losses: Sequence[dict[str, Tensor]]) -> None:
        """Count a step, with the losses and measures of each micro-step; a skipped step has none."""
        for each in losses:
            for name, value in each.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micro_steps += len(losses)
        self._steps_since += 1
        if self._log is not None:
            self._log.step()

    def means(self) -> dict[str, float]:
        """Means over all ranks and the micro-steps since the last report; empty if every step was skipped."""
        if not self._micro_steps:
            return {}
        sums = torch.stack(list(self._sums.values())).float() / self._micro_steps
        return dict(zip(self._sums, mean_over_ranks(sums).tolist(), strict=True))

    def write(self, step: int, bad: list[Bad], measures: dict[str, float | None]) -> None:
        """Report the steps since the last report; call on every rank.

        Args:
            step: how many steps the run has taken. bad: the bad samples that this rank has found.
            measures: further values of this step, the same on every rank.
        Raises:
            UserError: more than ``data.max_bad`` of the samples are bad.
        """
        means = self.means()
        found = self._bad_samples.count(bad)
        seconds, waited, steps = time.perf_counter() - self._began, self._waited, self._steps_since
        times = self._rank_times.gather(self._own_time.seconds() / steps)
        self.restart()
        if self._log is None:
            return
        images_per_s = steps * self._config.train.batch / seconds
        samples = step * self._config.train.batch
        values: dict[str, Any] = {
            "samples": samples,
            **means,
            **measures,
            "images_per_s": images_per_s,
            "data_wait": waited / seconds,
            "rank_seconds": times,
            "peak_memory_mb": _peak_memory(self._ranks.device) / 2**20,
            "bad_samples": found,
        }
        self._log.write(step, values)
        losses = {name: value for name, value in means.items() if name.startswith("loss")}
        left = (self._steps - step) * self._config.train.batch / images_per_s
        self._log.show(step, {**losses, "images/s": images_per_s}, left)
        if not self._told_time and step < self._steps:
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


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
