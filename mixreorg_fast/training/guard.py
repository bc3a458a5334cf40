"""Skip optimizer steps with non-finite or exploding gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..ranks import Ranks
from .watch import StopRequest

SETTLED = 20  # steps before a finite norm can be refused
MEMORY = 50  # steps that the running mean looks back on


class StepGuard:
    """Refuses optimizer steps by their gradient norm, which is the same on every rank.

    A non-finite loss gives a non-finite norm. The decision depends on the norms so far alone, so a resumed run decides
    as an uninterrupted one.

    Args:
        spike: refuse norms above this multiple of the running mean; 0: refuse non-finite norms only.
        state: of :meth:`state`.
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
        """Count a step with this gradient norm; returns whether it was refused."""
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


class GuardedStep:
    """Takes the optimizer steps of DeepSpeed's engine that a guard does not refuse."""

    def __init__(self, guard: StepGuard, ranks: Ranks):
        self._guard, self._ranks = guard, ranks

    def take(self, engine: Any, stop: StopRequest) -> tuple[float, int]:
        """Let the engine step.

        Returns:
            the gradient norm before clipping, and the signal that asked a rank to stop (0: none); both over all ranks.
        """
        self._engine, self._norm, self._outcome = engine, None, None
        if engine.zero_optimization_stage() == 0:  # from stage 1 on DeepSpeed keeps the norm before clipping
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients).item()
        self._asked = stop.shared(self._ranks)
        engine.step()
        return self._read()

    def refuses(self) -> bool:
        """Whether the guard refuses the current step; the optimizer asks within the engine's step."""
        return self._guard.refuses(self._read()[0])

    def _read(self) -> tuple[float, int]:
        """Both results of the step, read from the device once.

        The first read happens when the optimizer asks: DeepSpeed has just waited for the gradients to look for
        infinities, so this does not wait for the GPU again. After an overflow the optimizer is not called.
        """
        if self._outcome is None:
            wrapper = self._engine.optimizer
            if self._norm is None:
                self._norm = math.inf if wrapper.overflow else float(wrapper._global_grad_norm)
            self._outcome = self._norm, int(self._asked)
        return self._outcome


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that skips a step when `refuses()` is true.

    DeepSpeed, which wraps the optimizer, then treats the step like any other.
    """

    def __init__(self, parameters: Iterable[dict[str, Any]], refuses: Callable[[], bool], **options: Any):
        super().__init__(parameters, **options)
        self._refuses = refuses

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None if self._refuses() else super().step(closure)
