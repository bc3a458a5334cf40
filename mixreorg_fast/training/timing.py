"""Times of the ranks, to find a slow one.

Ranks end a step together, so their steps take equally long. A slow rank takes longer until the step's first exchange
between ranks: reading data and most of the forward pass. Under ZeRO-3, which exchanges parameters in the forward pass,
only the time for reading data shows it.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import torch

from ..ranks import Ranks, all_gather, gather_objects


class Stopwatch:
    """Sums intervals of a device's time; on a GPU by events, without waiting for them."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self._began: Any = None
        self._intervals: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin an interval, unless one has begun."""
        if self._began is None:
            self._began = self._mark()

    def stop(self) -> None:
        """End the interval, if one has begun."""
        if self._began is not None:
            self._intervals.append((self._began, self._mark()))
            self._began = None

    def seconds(self) -> float:
        """The sum of all intervals since the last restart; waits for the GPU to finish the last one."""
        if not self._cuda:
            return sum(end - begin for begin, end in self._intervals)
        if self._intervals:
            self._intervals[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._intervals) / 1000

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class RankTimes:
    """Compares the ranks' times; every rank makes one.

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
        slowest = times.index(max(times))
        mean = sum(times) / len(times)
        slowest_host = self._hosts[slowest]
        return {"min": min(times), "mean": mean, "max": max(times), "slowest": slowest, "host": slowest_host}

    def remark(self, times: dict[str, Any]) -> str | None:
        """A line that names a rank that has become slow; None, also for a rank named before."""
        rank = times["slowest"] if times["max"] > (1 + self._slow) * times["mean"] else -1
        before, self._suspect = self._suspect, rank
        if rank != before or rank == self._named:
            return None
        self._named = rank
        if rank < 0:
            return None
        share = times["max"] / times["mean"] - 1
        return (
            f"rank {rank} on {times['host']} is slow: {times['max']:.3g} s of a step until the first exchange, "
            f"{share:.0%} more than the ranks' mean (log.slow_rank)"
        )
