"""Two or four ranks with a share of the batch each against one process with the whole batch: losses, gradients,
running averages; with GradCache, of one big batch. And checkpoints: what one ZeRO stage saved, loaded by the same
stage and by another.

test_parity.py starts it, one launch for all cases: ``torchrun --nproc_per_node 2 -m tests.training.parity_worker FILE``
(by hand, a part of the cases' or engines' names may follow).
"""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.models import Batch, MixReorg
from mixreorg_fast.training import checkpoint
from mixreorg_fast.training.distributed import initialise
from mixreorg_fast.training.optimisation import deepspeed_config, optimizer
from tests.tiny import fill, random_batch, tiny_config

WORLD = int(os.environ.get("WORLD_SIZE", 1))
IMAGES = 16  # of a micro-step, over both ranks
ENGINES = ["plain", "zero0", "zero1", "zero2", "zero3", "offload2", "offload3"]
SECTIONS = {f"zero{stage}": {"zero_stage": stage} for stage in range(4)} | {
    "plain": {"zero_stage": 0},
    "offload2": {"zero_stage": 2, "offload_optimizer": True},
    "offload3": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
MUON = ["muon0", "muon1", "muon2"]
SECTIONS |= {name: {"zero_stage": stage} for stage, name in enumerate(MUON)}
# Each to the next one.
RESUMED = [pair for names in (ENGINES[1:], MUON) for pair in zip(names, [*names[1:], names[0]], strict=True)]


def cases(world: int) -> list[dict]:
    """Every engine with accumulation 1 and 4, and with GradCache; the parts that draw random numbers are all on.

    Four ranks exchange features in a ring.
    """
    full = {"model": {"drop_path": 0.3}, "loss": {"multi_label": 0.5}}
    if world == 4:
        full["loss"]["exchange"] = "ring"
    ranks = f", {world} ranks"
    found = [
        {"name": f"{engine}, accumulation {accumulation}{ranks}", "engine": engine, "accumulation": accumulation}
        for engine in (ENGINES if world == 2 else ENGINES[1:])
        for accumulation in (1, 4)
    ] + [
        {"name": f"{engine}, grad cache{ranks}", "engine": engine, "accumulation": 2, "grad_cache": True}
        for engine in (ENGINES if world == 2 else ["zero2"])
    ]
    if world == 2:
        found += [
            {"name": "batch negatives, zero2", "engine": "zero2", "loss": {"mixed_negatives": "batch"}},
            {
                "name": "attributed negatives, context in half of the groups, zero2",
                "engine": "zero2",
                "loss": {"mixed_negatives": "attributed"},
                "mixing": {"context_share": 0.5},
            },
            {
                "name": "attributed negatives, context in half of the groups, zero2, grad cache",
                "engine": "zero2",
                "accumulation": 2,
                "grad_cache": True,
                "loss": {"mixed_negatives": "attributed"},
                "mixing": {"context_share": 0.5},
            },
            {"name": "groupvit, zero2", "engine": "zero2", "model": {"method": "groupvit"}, "loss": {}},
            {"name": "checkpointed, zero2", "engine": "zero2", "checkpoint": True},
        ]
    # Soft assignment: a hard one that rounding turns over is no small deviation.
    soft = {"precision": "bf16", "model": {"drop_path": 0.3, "hard_assignment": False}}
    found += [
        {"name": f"{engine}, bf16{ranks}", "engine": engine, **soft}
        for engine in (ENGINES[1:] if world == 2 else ["zero2"])
    ]
    return [{"accumulation": 1, "grad_cache": False, "precision": "fp32", **full, **case} for case in found]


def settings(case: dict):
    return tiny_config(
        model=case["model"],
        loss=case["loss"],
        train={
            "batch": IMAGES * case["accumulation"],
            "accumulation": case["accumulation"],
            "grad_cache": case["grad_cache"],
            "precision": case["precision"],
            "checkpoint_activations": case.get("checkpoint", False),
            "clip": 0.0,
            "optimizer": "muon" if case["engine"] in MUON else "adamw",
        },
        mixing=case.get("mixing", {}),
        deepspeed=SECTIONS[case["engine"]],
    )


def part(batch: Batch, start: int, images: int) -> Batch:
    """Some consecutive images of a batch."""
    rows = slice(start, start + images)
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


def share(batch: Batch, rank: int) -> Batch:
    """One rank's share of a batch."""
    return part(batch, rank * IMAGES // WORLD, IMAGES // WORLD)


_WHOLE: dict[str, dict] = {}


def whole(case: dict) -> dict:
    """Losses, gradients and buffers of one process with the whole batch; the same for every engine."""
    key = json.dumps({name: value for name, value in case.items() if name not in ("name", "engine")})
    if key not in _WHOLE:
        _WHOLE[key] = found = _whole(case)
        found["noise"] = 0.0
        if case["precision"] == "bf16":
            found["noise"], _ = farthest(found["gradients"], _whole({**case, "precision": "fp32"})["gradients"])
    return _WHOLE[key]


def farthest(gradients: dict, truth: dict) -> tuple[float, str]:
    """The largest deviation of any gradient, and whose it is.

    It is relative to the gradient's largest value, or to a tenth of the largest of all: a bias in front of a
    normalisation has no gradient but rounding.
    """
    floor = 0.1 * max(gradient.abs().max() for gradient in truth.values())
    return max((((gradients[n] - x).abs().max() / x.abs().max().clamp(min=floor)).item(), n) for n, x in truth.items())


def _whole(case: dict) -> dict:
    config = settings(case)
    model = MixReorg(config)
    fill(model)
    start = copy.deepcopy(model.state_dict())
    nouns = 2 if case["loss"] else 0
    if case["grad_cache"]:
        batches = [random_batch(config, IMAGES * case["accumulation"], nouns=nouns)]
    else:
        batches = [random_batch(config, IMAGES, seed=i, nouns=nouns) for i in range(case["accumulation"])]
    losses = []
    for batch in batches:
        out = model(batch)
        (out["loss"] / len(batches)).backward()
        losses.append({name: value.item() for name, value in out.items()})
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "start": start,
        "batches": batches,
        "losses": losses,
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


def micro_steps(case: dict, model: MixReorg, batches: list[Batch], rank: int):
    """This rank's calls of the model in an optimizer step, as the trainer makes them."""
    if not case["grad_cache"]:
        for batch in batches:
            yield (share(batch, rank),)
        return
    size = IMAGES // WORLD
    *others, last = [part(batches[0], number * IMAGES + rank * size, size) for number in range(case["accumulation"])]
    with torch.no_grad():
        cached = [model.features(batch).cached() for batch in others]
    yield last, cached
    for batch, features in zip(others, cached, strict=True):
        yield batch, (), features.gradients()


def compare(case: dict, expected: dict, rank: int) -> dict[str, float]:
    """Largest deviations of this rank from the whole-batch run."""
    config = settings(case)
    model = MixReorg(config)
    model.load_state_dict(expected["start"])
    engine = model
    if case["engine"] != "plain":
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer(model, config), config=deepspeed_config(config, WORLD)
        )
    deviation = {"loss": 0.0, "gradient": 0.0, "buffer": 0.0}
    weight = case["accumulation"] / len(expected["losses"])
    losses = iter(expected["losses"])
    for number, arguments in enumerate(micro_steps(case, model, expected["batches"], rank)):
        if number and engine is not model:
            engine.step()  # of the micro-step before; DeepSpeed counts them by this call
        out = engine(*arguments)
        if case["engine"] == "plain":
            (out["loss"] * weight / case["accumulation"]).backward()
        else:
            engine.backward(out["loss"] * weight)
        if len(out) == 1:
            continue
        truth = next(losses)
        for name, value in out.items():
            value = value.detach().clone()
            dist.all_reduce(value)
            deviation["loss"] = max(deviation["loss"], abs(value.item() / WORLD - truth[name]))
    gradients = {}
    for name, parameter in model.named_parameters():
        if case["engine"] == "plain":
            gradients[name] = parameter.grad.clone()
            dist.all_reduce(gradients[name])
            gradients[name] /= WORLD
        else:
            gradients[name] = deepspeed.utils.safe_get_full_grad(parameter)
    deviation["gradient"], worst = farthest(gradients, expected["gradients"])
    for name, value in model.named_buffers():
        deviation["buffer"] = max(deviation["buffer"], (value - expected["buffers"][name]).abs().max().item())
    return {**deviation, "worst": worst, "noise": expected["noise"]}


def start(name: str, checkpointed: Path | None = None):
    """An engine of one of ENGINES, new or from a checkpoint of two steps."""
    config = settings({**cases(2)[0], "engine": name, "model": {}, "loss": {}, "mixing": {"group_tokens": "learned"}})
    model = MixReorg(config)
    fill(model)
    if checkpointed is not None:
        fill(model, seed=1)
        checkpoint.restore_weights(model, checkpointed)
    steps = optimizer(model, config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=steps, config=deepspeed_config(config, WORLD))
    steps.lay_out(engine)
    checkpoint.start_moments(engine)
    if checkpointed is not None:
        checkpoint.restore_moments(engine, checkpointed, updates=2)
    return engine


def two_steps(engine, seed: int, rank: int) -> list[float]:
    """Losses of two optimizer steps."""
    losses = []
    for number in (seed, seed + 1):
        out = engine(share(random_batch(engine.module.config, IMAGES, seed=number), rank))
        engine.backward(out["loss"])
        engine.step()
        losses.append(out["loss"].item())
    return losses


def resume(name: str, other: str, folder: Path, world) -> dict:
    """Two steps with engine `name`, a checkpoint, two more; against the last two of engines that loaded it."""

    def state(engine) -> dict:
        return {**checkpoint.optimizer_state(engine), **checkpoint.portable_state(engine)}

    def equal(a: dict, b: dict) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    engine = start(name)
    two_steps(engine, 0, world.rank)
    path = checkpoint.save(folder / name, engine, {"step": 2}, 1, Tokenizer.train(["a"], 300))
    saved = state(engine)
    losses = two_steps(engine, 2, world.rank)
    same, another = start(name, path), start(other, path)
    loaded = equal(saved, state(same)) and equal(saved, state(another))
    exact = losses == two_steps(same, 2, world.rank) and equal(state(engine), state(same))
    deviation = max(abs(a - b) for a, b in zip(losses, two_steps(another, 2, world.rank), strict=True))
    return {"loaded": loaded, "exact": exact, "deviation": deviation}


def main(out: str, only: str = "") -> None:
    torch.set_num_threads(1)
    chosen = [case for case in cases(WORLD) if only in case["name"]]
    expected = [whole(case) for case in chosen]  # before there is a process group to sum over
    world = initialise()
    torch.set_num_threads(1)
    results = {case["name"]: compare(case, truth, world.rank) for case, truth in zip(chosen, expected, strict=True)}
    for name, other in RESUMED if WORLD == 2 else ():
        if only not in name:
            continue
        results[f"{name} to {other}"] = resume(name, other, Path(out).parent, world)
    if world.is_main:
        Path(out).write_text(json.dumps(results, indent=2))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
