"""Steps that are better not taken: a loss that is not a number, a gradient far beyond the usual."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

# Steps before a norm can be called unusual, and how many the running mean looks back on.
SETTLED, MEMORY = 20, 50


class StepGuard:
    """Judges each optimizer step by its gradient norm, which is the same on every rank; a loss that is not finite
    gives a norm that is not. A pure function of the norms so far, so a resumed run judges as the uninterrupted one.

    Args:
        spike: a norm of more than so many times the running mean is refused; 0: only those that are not finite.
        state: as :meth:`state` gave it.
    """

    def __init__(self, spike: float, state: dict[str, Any] | None = None):
        state = state or {"taken": 0, "skipped": 0, "in_a_row": 0, "mean": 0.0}
        self._spike = spike
        self.taken, self.skipped, self.in_a_row = state["taken"], state["skipped"], state["in_a_row"]
        self._mean = state["mean"]

    def refuses(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        return self._spike > 0 and self.taken >= SETTLED and norm > self._spike * self._mean

    def record(self, norm: float) -> bool:
        """Count a step of this gradient norm; whether it was refused."""
        if self.refuses(norm):
            self.skipped += 1
            self.in_a_row += 1
            return True
        self.taken += 1
        self.in_a_row = 0
        self._mean += (norm - self._mean) / min(self.taken, MEMORY)
        return False

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "skipped": self.skipped, "in_a_row": self.in_a_row, "mean": self._mean}


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing while `refuses()`: everything around it, in whatever wraps it, goes on as ever."""

    refuses: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None if self.refuses() else super().step(closure)
