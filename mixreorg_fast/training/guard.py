"""Skip optimizer steps with non-finite or exploding gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..ranks import Ranks
from .watch import StopRequest

SETTLED = 20  # steps before a finite norm can be refused
MEMORY = 50  # steps that the running mean looks back on


@dataclass
class StepGuard:
    """Refuses optimizer steps by their gradient norm, which is the same on every rank.

    A non-finite loss gives a non-finite norm. The decision depends on the norms so far alone, so a resumed run decides
    as an uninterrupted one.

    Args:
        spike: refuse norms above this multiple of the running mean; 0: refuse non-finite norms only.
        The others are those of :meth:`state`.
    """

    spike: float
    taken: int = 0
    skipped: int = 0
    in_a_row: int = 0
    mean: float = 0.0

    def refuses(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        return self.spike > 0 and self.taken >= SETTLED and norm > self.spike * self.mean

    def record(self, norm: float) -> bool:
        """Count a step with this gradient norm; returns whether it was refused."""
        if self.refuses(norm):
            self.skipped += 1
            self.in_a_row += 1
            return True
        self.taken += 1
        self.in_a_row = 0
        self.mean += (norm - self.mean) / min(self.taken, MEMORY)
        return False

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "skipped": self.skipped, "in_a_row": self.in_a_row, "mean": self.mean}

    def take(self, engine: Any, stop: StopRequest, ranks: Ranks) -> tuple[float, int]:
        """Let DeepSpeed's engine step, unless the guard refuses.

        Returns:
            the gradient norm before clipping, and the signal that asked a rank to stop (0: none); both over all ranks.
        """
        norm, asked = None, stop.shared(ranks)
        if engine.zero_optimization_stage() == 0:  # from stage 1 on DeepSpeed keeps the norm before clipping
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])

        # Read from the device once, when the optimizer asks: DeepSpeed has just waited for the gradients to look for
        # infinities, so this does not wait for the GPU again. After an overflow the optimizer is not called.
        @functools.cache
        def outcome() -> tuple[float, int]:
            wrapper = engine.optimizer
            if norm is not None:
                return norm.item(), int(asked)
            return math.inf if wrapper.overflow else float(wrapper._global_grad_norm), int(asked)

        self._outcome = outcome
        engine.step()
        return outcome()

    def refuses_now(self) -> bool:
        """Whether the guard refuses the current step; the optimizer asks within the engine's step."""
        return self.refuses(self._outcome()[0])


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that skips the steps that a guard refuses.

    DeepSpeed, which wraps the optimizer, then treats the step like any other.
    """

    def __init__(self, parameters: Iterable[dict[str, Any]], guard: StepGuard | None, **options: Any):
        super().__init__(parameters, **options)
        self._guard = guard

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None if self._guard is not None and self._guard.refuses_now() else super().step(closure)
