"""Two ranks with half the batch each against one process with the whole batch: losses, gradients, running averages.

test_parity.py starts it, one launch for all cases: ``torchrun --nproc_per_node 2 -m tests.training.parity_worker FILE``
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mixreorg_fast.models import Batch, MixReorg
from mixreorg_fast.training.distributed import initialise
from mixreorg_fast.training.optimisation import deepspeed_config, optimizer
from tests.tiny import fill, random_batch, tiny_config

WORLD = 2
IMAGES = 16  # of a micro-step, over both ranks
ENGINES = ["plain", "zero0", "zero1", "zero2", "zero3"]


def cases() -> list[dict]:
    """Every engine with accumulation 1 and 4; the parts that draw random numbers are all on."""
    full = {"model": {"drop_path": 0.3}, "loss": {"multi_label": 0.5}}
    return [
        {"name": f"{engine}, accumulation {accumulation}", "engine": engine, "accumulation": accumulation, **full}
        for engine in ENGINES
        for accumulation in (1, 4)
    ] + [
        {"name": "groupvit, zero2", "engine": "zero2", "accumulation": 1, "model": {"method": "groupvit"}, "loss": {}},
        {"name": "checkpointed, zero2", "engine": "zero2", "accumulation": 1, "checkpoint": True, **full},
    ]


def settings(case: dict):
    return tiny_config(
        model=case["model"],
        loss=case["loss"],
        train={
            "batch": IMAGES * case["accumulation"],
            "accumulation": case["accumulation"],
            "checkpoint_activations": case.get("checkpoint", False),
            "clip": 0.0,
        },
        deepspeed={"zero_stage": int(case["engine"].removeprefix("zero")) if case["engine"] != "plain" else 0},
    )


def share(batch: Batch, rank: int) -> Batch:
    """One rank's half of a batch."""
    rows = slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
    prompts = slice(rows.start * 2, rows.stop * 2)
    nouns = batch.noun_ids is not None
    return replace(
        batch,
        images=batch.images[rows],
        ids=batch.ids[rows],
        lengths=batch.lengths[rows],
        first_image=rows.start,
        noun_ids=batch.noun_ids[rows] if nouns else None,
        noun_lengths=batch.noun_lengths[prompts] if nouns else None,
    )


def whole(case: dict) -> dict:
    """Losses, gradients and buffers of one process with the whole batch."""
    config = settings(case)
    model = MixReorg(config)
    fill(model)
    start = copy.deepcopy(model.state_dict())
    batches = [
        random_batch(config, IMAGES, seed=i, nouns=2 if case["loss"] else 0) for i in range(case["accumulation"])
    ]
    losses = []
    for batch in batches:
        out = model(batch)
        (out["loss"] / case["accumulation"]).backward()
        losses.append({name: value.item() for name, value in out.items()})
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "config": config,
        "start": start,
        "batches": batches,
        "losses": losses,
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


def compare(case: dict, expected: dict, rank: int) -> dict[str, float]:
    """Largest deviations of this rank from the whole-batch run.

    A gradient's is relative to its largest value, or to a tenth of the largest of all: a bias in front of a
    normalisation has no gradient but rounding.
    """
    config = expected["config"]
    model = MixReorg(config)
    model.load_state_dict(expected["start"])
    engine = model
    if case["engine"] != "plain":
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer(model, config), config=deepspeed_config(config, WORLD)
        )
    deviation = {"loss": 0.0, "gradient": 0.0, "buffer": 0.0}
    worst = ""
    for number, (batch, losses) in enumerate(zip(expected["batches"], expected["losses"], strict=True)):
        if number and engine is not model:
            engine.step()  # of the micro-step before; DeepSpeed counts them by this call
        out = engine(share(batch, rank))
        if case["engine"] == "plain":
            (out["loss"] / case["accumulation"]).backward()
        else:
            engine.backward(out["loss"])
        for name, value in out.items():
            value = value.detach().clone()
            dist.all_reduce(value)
            deviation["loss"] = max(deviation["loss"], abs(value.item() / WORLD - losses[name]))
    largest = max(gradient.abs().max() for gradient in expected["gradients"].values())
    for name, parameter in model.named_parameters():
        if case["engine"] == "plain":
            gradient = parameter.grad.clone()
            dist.all_reduce(gradient)
            gradient /= WORLD
        else:
            gradient = deepspeed.utils.safe_get_full_grad(parameter)
        truth = expected["gradients"][name]
        error = ((gradient - truth).abs().max() / truth.abs().max().clamp(min=0.1 * largest)).item()
        if error > deviation["gradient"]:
            deviation["gradient"], worst = error, name
    for name, value in model.named_buffers():
        deviation["buffer"] = max(deviation["buffer"], (value - expected["buffers"][name]).abs().max().item())
    return {**deviation, "worst": worst}


def main(out: str) -> None:
    torch.set_num_threads(1)
    expected = [whole(case) for case in cases()]  # before there is a process group to sum over
    world = initialise()
    torch.set_num_threads(1)
    results = {case["name"]: compare(case, truth, world.rank) for case, truth in zip(cases(), expected, strict=True)}
    if world.is_main:
        Path(out).write_text(json.dumps(results, indent=2))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
