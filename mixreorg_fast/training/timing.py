"""Which rank the others wait for.

Ranks leave a step together, so their steps take equally long, however unequal they are. What tells them apart is how
long each takes to come to the step's first exchange: reading data and most of the forward, its own work alone. (Under
ZeRO-3, which exchanges parameters before that, it is the reading alone that differs.)
"""

from __future__ import annotations

import socket
import time
from typing import Any

import torch

from ..ranks import Ranks, all_gather, gather_objects


class Stopwatch:
    """Adds up stretches of time of a device, as it sees them: on a GPU by events, for which nothing waits."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self._began: Any = None
        self._stretches: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin a stretch; nothing if one has begun."""
        if self._began is None:
            self._began = self._mark()

    def stop(self) -> None:
        """End the stretch; nothing if none has begun."""
        if self._began is not None:
            self._stretches.append((self._began, self._mark()))
            self._began = None

    def seconds(self) -> float:
        """Of all stretches since the last restart; waits for the GPU to have come to the end of the last one."""
        if not self._cuda:
            return sum(end - begin for begin, end in self._stretches)
        if self._stretches:
            self._stretches[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._stretches) / 1000

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class RankTimes:
    """Compares the ranks' own times of a step; make one on every rank.

    Args:
        slow: a rank is named that is slower than the mean by more than this share, twice running.
    """

    def __init__(self, ranks: Ranks, slow: float):
        self._ranks, self._slow = ranks, slow
        self._hosts = gather_objects(socket.gethostname())
        self._suspect = self._named = -1

    def gather(self, seconds: float) -> dict[str, Any]:
        """``min``, ``mean`` and ``max`` of the ranks' seconds, the ``slowest`` rank and its ``host``; call on every
        rank."""
        times = all_gather(torch.tensor([seconds], dtype=torch.float64, device=self._ranks.device)).tolist()
        slowest = times.index(max(times))
        mean = sum(times) / len(times)
        return {
            "min": min(times),
            "mean": mean,
            "max": max(times),
            "slowest": slowest,
            "host": self._hosts[slowest],
        }

    def remark(self, times: dict[str, Any]) -> str | None:
        """A line that names a rank that has become slow, once."""
        rank = times["slowest"] if times["max"] > (1 + self._slow) * times["mean"] else -1
        before, self._suspect = self._suspect, rank
        if rank != before or rank == self._named:
            return None
        self._named = rank
        if rank < 0:
            return None
        share = times["max"] / times["mean"] - 1
        return (
            f"rank {rank} on {times['host']} is slow: a step takes it {times['max']:.3g} s to the first exchange, "
            f"{share:.0%} more than the ranks' mean (log.slow_rank)"
        )
