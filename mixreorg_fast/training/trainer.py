"""The training loop: one forward per micro-step under DeepSpeed, everything else around it."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..data.loader import Batch as LoadedBatch
from ..data.loader import TrainLoader
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files import write_json
from ..models import Batch, MixReorg, weights
from . import checkpoint, validation
from .distributed import World, import_deepspeed, initialise, mean_over_ranks, on_main
from .metrics import MetricsLog
from .optimisation import deepspeed_config, learning_rate, optimizer, schedule_length
from .preparation import prepare


def train(config: Config, resume: str = "auto") -> dict[str, Any]:
    """Train as `config` says and leave the run folder; returns the final scores.

    Args:
        resume: "auto" goes on from the newest complete checkpoint of the run folder, "never" sets what is there aside
            and starts anew, a path goes on from that checkpoint.
    Raises:
        UserError: on every rank, with the same text.
    """
    world = initialise()
    config.micro_batch(world.size)  # refused before anything is made
    source, state = on_main(world, lambda: _checkpoint_to_resume(config, resume))
    prepared = on_main(world, lambda: prepare(config, resuming=source is not None))
    return Trainer(prepared.config, prepared.samples, world, source, state).run()


def micro_step_seed(seed: int, position: int) -> int:
    """Seed of the micro-step whose first image (over all ranks) is number `position` of the run; below 2**62."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class Trainer:
    """One run on one rank, new or going on from the checkpoint `source` with its `state`."""

    def __init__(self, config: Config, samples: int, world: World, source: Path | None, state: dict[str, Any]):
        self.config, self.world = config, world
        self.run_folder = config.run_folder
        self.tokenizer = Tokenizer.load(self.run_folder / weights.TOKENIZER)
        self.steps, self.warmup = schedule_length(config, samples)
        self.micro_batch = config.micro_batch(world.size)
        self.step, self.best = state.get("step", 0), state.get("best")
        self.updates = state.get("updates", 0)

        torch.manual_seed(config.seed)
        module = MixReorg(config)
        module.backbone.tokenizer = self.tokenizer
        if source is not None:
            checkpoint.restore_weights(module, source)
        elif config.model.init is not None:
            weights.load_state(module.backbone, weights.find_weights(config.model.init))
        module.to(world.device)
        deepspeed = import_deepspeed()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer(module, config), config=deepspeed_config(config, world.size)
        )
        checkpoint.start_moments(self.engine)
        if source is not None:
            checkpoint.restore_moments(self.engine, source, self.updates)
            if world.is_main:
                print(f"resumed from {source} at step {self.step}", flush=True)

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate, draw; returns the final scores."""
        log = MetricsLog(self.run_folder, self.step, self.steps) if self.world.is_main else None
        loader = TrainLoader(
            self.config,
            self.tokenizer,
            micro_batch=self.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            start=self.step * self.config.train.batch,
            device=self.world.device,
        )
        try:
            with loader:
                last = self._loop(loader, log)
        finally:
            if log is not None:
                log.close()
        return self._finish(last)

    def _loop(self, loader: TrainLoader, log: MetricsLog | None) -> torch.Tensor:
        """All remaining steps; returns images of the last micro-step, for the pictures."""
        batches: Iterator[LoadedBatch] = iter(loader)
        window = _Window(loader)
        loaded = None
        self.engine.train()
        while self.step < self.steps:
            self._set_learning_rate()
            for _ in range(self.config.train.accumulation):
                loaded = next(batches)
                losses = self.engine(self._batch(loaded))
                self.engine.backward(losses["loss"])
                norm = self._gradient_norm()
                self.engine.step()  # counts the micro-step; the optimizer's own step comes with the last
                window.add(losses)
            self.step += 1
            self.updates += 1
            if log is not None:
                log.step()
            if self.step % self.config.train.log_every == 0 or self.step == self.steps:
                self._report(window, loader, log, norm)
            if self._due(self.config.eval.every):
                self._validate(log)
                window.restart()
            if self._due(self.config.checkpoint.every) or self.step == self.steps:
                self._save()
                window.restart()
        return next(batches).images if loaded is None else loaded.images

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0 and self.step < self.steps

    def _batch(self, loaded: LoadedBatch) -> Batch:
        first = self.world.rank * self.micro_batch
        seed = torch.tensor(micro_step_seed(self.config.seed, loaded.position - first))
        nouns = loaded.noun_ids
        device = self.world.device
        return Batch(
            loaded.images.to(device, non_blocking=True),
            loaded.ids.to(device, non_blocking=True),
            loaded.lengths,
            seed.to(device, non_blocking=True),
            first,
            None if nouns is None else nouns.to(device, non_blocking=True),
            loaded.noun_lengths,
        )

    def _set_learning_rate(self) -> None:
        settings = self.config.train
        rate = learning_rate(
            self.step, steps=self.steps, warmup=self.warmup, peak=settings.lr, floor=min(settings.min_lr, settings.lr)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _gradient_norm(self) -> torch.Tensor | None:
        """Norm before clipping, where DeepSpeed does not keep it (stage 0)."""
        if self.engine.zero_optimization_stage() > 0 or not self.engine.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    # ------------------------------------------------------------------ reports, scores, checkpoints

    def _report(self, window: _Window, loader: TrainLoader, log: MetricsLog | None, norm: torch.Tensor | None) -> None:
        names, sums = window.sums()
        means = dict(zip(names, mean_over_ranks(sums, self.world), strict=True))
        seconds, waited = window.times(loader)
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        steps = window.micro_steps / self.config.train.accumulation
        window.restart()
        if log is None:
            return
        images_per_s = steps * self.config.train.batch / seconds
        values = {
            "samples": self.step * self.config.train.batch,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm) if norm is not None else None,
            "temperature": self.engine.module.backbone.logit_multiplier().item(),
            "images_per_s": images_per_s,
            "data_wait": waited / seconds,
            "peak_memory_mb": _peak_memory(self.world.device) / 2**20,
            "bad_samples": len(loader.bad_samples),
        }
        log.write(self.step, values)
        shown = {name: value for name, value in means.items() if name.startswith("loss")}
        left = (self.steps - self.step) * self.config.train.batch / images_per_s
        log.show(self.step, {**shown, "images/s": images_per_s}, left)

    def _validate(self, log: MetricsLog | None) -> None:
        """Score a part of the evaluation data; keep the weights whose mean mIoU is the best so far."""
        state = checkpoint.portable_state(self.engine)
        backbone = self.engine.module.backbone
        model = validation.evaluation_model(backbone, state, self.world)
        scores = validation.score(model, self.config, self.tokenizer, self.world, limit=self.config.eval.every_images)
        figures = validation.headline(scores)
        values = [value["mIoU"] for value in scores.values() if "mIoU" in value]
        mean = sum(values) / len(values) if values else None
        better = mean is not None and (self.best is None or mean > self.best)
        if better:
            self.best = mean
        if log is not None:
            log.write(self.step, {"validation": figures})
            log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
            if better:
                weights.save(backbone, self.run_folder / "best", state)

    def _save(self) -> None:
        state = {
            "samples": self.step * self.config.train.batch,
            "updates": self.updates,
            "seed": self.config.seed,
            "batch": self.config.train.batch,
            "best": self.best,
        }
        checkpoint.save(self.run_folder, self.step, self.engine, self.world, state, self.config.checkpoint.keep)

    def _finish(self, images: torch.Tensor) -> dict[str, Any]:
        state = checkpoint.portable_state(self.engine)
        model = validation.evaluation_model(self.engine.module.backbone, state, self.world)
        scores = validation.score(model, self.config, self.tokenizer, self.world, limit=None)
        if self.world.is_main:
            write_json(self.run_folder / "eval.json", scores)
            validation.draw(model, self.config, self.tokenizer, images, self.run_folder)
            for name, value in validation.headline(scores).items():
                print(f"{name} {value:.2f}", flush=True)
            print(f"run folder: {self.run_folder}", flush=True)
        return scores


class _Window:
    """Means and times since the last report. Sums stay on the device, so that steps need not wait for them."""

    def __init__(self, loader: TrainLoader):
        self._loader = loader
        self.restart()

    def restart(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self.micro_steps = 0
        self._start, self._waited = time.perf_counter(), self._loader.wait_seconds

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.micro_steps += 1

    def sums(self) -> tuple[list[str], torch.Tensor]:
        """Names and means over the window's micro-steps, one tensor."""
        return list(self._sums), torch.stack(list(self._sums.values())).float() / self.micro_steps

    def times(self, loader: TrainLoader) -> tuple[float, float]:
        """Seconds since the window began, and those of them spent waiting for data."""
        return time.perf_counter() - self._start, loader.wait_seconds - self._waited


def _checkpoint_to_resume(config: Config, resume: str) -> tuple[Path | None, dict[str, Any]]:
    """The newest sound checkpoint to go on from and its state; makes way for a run that starts anew."""
    run = config.run_folder
    candidates = checkpoint.find(run, resume)
    if not candidates:
        if resume == "never" and run.exists():
            _set_aside(run)
        return None, {}
    expected = {"seed": config.seed, "batch": config.train.batch}
    for number, source in enumerate(candidates, start=1):
        try:
            state = checkpoint.read_state(source, expected)
            break
        except checkpoint.Damaged as error:
            if number == len(candidates):
                raise
            print(f"warning: {error}; taking the checkpoint before it", file=sys.stderr, flush=True)
    run.mkdir(parents=True, exist_ok=True)
    if not (source / weights.TOKENIZER).is_file():
        raise UserError(f"{source} has no {weights.TOKENIZER}")
    shutil.copyfile(source / weights.TOKENIZER, run / weights.TOKENIZER)
    for aside in checkpoint.set_aside_after(run, state["step"]):
        print(f"a later checkpoint is set aside as {aside}", flush=True)
    return source, state


def _set_aside(run: Path) -> None:
    number = 1
    while (aside := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    run.rename(aside)
    print(f"{run} set aside as {aside}", flush=True)


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
