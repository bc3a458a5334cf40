"""Learning rate, optimizer, the guard that skips its steps where gradients explode, and DeepSpeed's configuration."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..ranks import Ranks
from .muon import MOMENTUM, Flat, directions
from .watch import StopRequest

SETTLED = 20  # steps before the guard can refuse a finite norm
MEMORY = 50  # steps that its running mean looks back on

# Gradients in one reduction. DeepSpeed allocates a whole bucket in fp32, by default 2 GB. 64 MB hold the largest
# parameter (a vocabulary of 49,408 at width 256) and suffice for an all-reduce to reach its bandwidth.
REDUCE_BUCKET = 1 << 24


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor`; `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def schedule_length(config: Config, samples: int) -> tuple[int, int]:
    """Optimizer steps of the whole run and of its warm-up, for a training set of `samples`."""
    per_epoch = samples / config.train.batch
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * per_epoch))
    if config.train.warmup_steps is not None:
        return steps, min(config.train.warmup_steps, steps)
    # A run shorter than its usual warm-up warms up for a tenth of its steps.
    return steps, min(round(config.train.warmup_epochs * per_epoch), steps // 10)


def optimizer(model: nn.Module, config: Config, guard: StepGuard | None = None) -> GuardedAdamW:
    """AdamW, or Muon for the weight matrices; without weight decay of biases, normalisations, embeddings, learned
    tokens and the logit scale."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith(("tokens.weight", "positions.weight"))
        (decayed if is_matrix and "embedding" not in name else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.train.weight_decay, "matrices": True},
        {"params": free, "weight_decay": 0.0, "matrices": False},
    ]
    made = GuardedMuon if config.train.optimizer == "muon" else GuardedAdamW
    return made(groups, guard, lr=config.train.lr, betas=config.train.betas, fused=True)


def deepspeed_config(config: Config, world_size: int, *, on_gpu: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for a run on `world_size` ranks.

    Parameters are fp32 and the model casts activations itself, so DeepSpeed runs in fp32 for either precision.
    """
    ours = config.deepspeed
    zero: dict[str, Any] = {"stage": ours.zero_stage, "reduce_bucket_size": REDUCE_BUCKET}
    for name, offloads in (("offload_optimizer", ours.offload_optimizer), ("offload_param", ours.offload_parameters)):
        zero |= {name: {"device": "cpu", "pin_memory": on_gpu}} if offloads else {}
    settings = {
        "train_micro_batch_size_per_gpu": config.micro_batch(world_size),
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.train.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # GuardedAdamW, a class that it does not know
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice in every micro-step
    }
    extra = dict(config.deepspeed.options)
    zero.update(extra.pop("zero_optimization", {}))
    return {**settings, **extra}


@dataclass
class StepGuard:
    """Refuses optimizer steps by their gradient norm, which is the same on every rank.

    A non-finite loss gives a non-finite norm. The decision depends on the norms so far alone, so a resumed run decides
    as an uninterrupted one.
    """

    spike: float  # refuse norms above this multiple of the running mean; 0: refuse non-finite norms only
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

        Returns the gradient norm before clipping, and the signal that asked a rank to stop (0: none), over all ranks.
        """
        norm, asked = None, stop.shared(ranks)
        if engine.zero_optimization_stage() == 0:  # from stage 1 on DeepSpeed keeps the norm before clipping
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])

        # Read from the device once, when the optimizer asks: DeepSpeed has just waited for the gradients to look for
        # infinities, so this does not wait for the GPU again. After an overflow the optimizer is not called.
        @functools.cache
        def outcome() -> tuple[float, int]:
            if norm is not None:
                return norm.item(), int(asked)
            return math.inf if engine.optimizer.overflow else float(engine.optimizer._global_grad_norm), int(asked)

        self._outcome = outcome
        engine.step()
        return outcome()

    def refuses_now(self) -> bool:
        """Whether the guard refuses the current step; the optimizer asks within the engine's step."""
        return self.refuses(self._outcome()[0])


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that skips the steps that a guard refuses; to DeepSpeed, which wraps it, they are steps like any other."""

    def __init__(self, parameters: Iterable[dict[str, Any]], guard: StepGuard | None, **options: Any):
        super().__init__(parameters, **options)
        self._guard = guard

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if self._guard is None or not self._guard.refuses_now():
            self._take()
        return None

    def _take(self) -> None:
        super().step()

    def lay_out(self, engine: Any) -> None:
        """Called once DeepSpeed's engine has replaced the parameters by its own tensors."""


class GuardedMuon(GuardedAdamW):
    """As :class:`GuardedAdamW`, with Muon's update of the weight matrices, the groups with ``"matrices": True``.

    Muon's momentum is kept as Adam's first moment; the second stays 0.
    """

    _flat: Flat | None = None  # where ZeRO keeps the matrices in one tensor
    _dtype = torch.float32  # of the orthogonalisation

    def lay_out(self, engine: Any) -> None:
        self._dtype = engine.module.dtype
        self._flat = Flat(engine.optimizer) if engine.zero_optimization_stage() else None

    @torch.no_grad()
    def _take(self) -> None:
        # With ZeRO, DeepSpeed calls this for each group alone.
        for group in self.param_groups:
            if group["matrices"]:
                self._take_matrices(group)
        super()._take()  # AdamW's step of the other groups: matrices have no gradients left

    def _take_matrices(self, group: dict[str, Any]) -> None:
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        updates = [tensor.grad.lerp(self._momentum(tensor), MOMENTUM) for tensor in tensors]
        if self._flat is None:
            found = directions([update.flatten(1) for update in updates], self._dtype)
        else:
            found = [self._flat.directions(update, self._dtype) for update in updates]
        for tensor, direction in zip(tensors, found, strict=True):
            tensor.mul_(1 - group["lr"] * group["weight_decay"])
            tensor.sub_(direction.view_as(tensor), alpha=group["lr"])
            tensor.grad = None

    def _momentum(self, tensor: Tensor) -> Tensor:
        """The momentum after this step's gradient."""
        state = self.state[tensor]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(tensor)
        return state["exp_avg"].lerp_(tensor.grad, 1 - MOMENTUM)
