"""Learning rate, optimizer, and DeepSpeed's configuration."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..config import Config
from .guard import GuardedAdamW, StepGuard

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
    """AdamW without weight decay of biases, normalisations, learned tokens and the logit scale."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith(("tokens.weight", "positions.weight"))
        (decayed if is_matrix and "embedding" not in name else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return GuardedAdamW(groups, guard, lr=config.train.lr, betas=config.train.betas, fused=True)


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
