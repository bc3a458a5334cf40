"""The training loop: one forward per micro-step under DeepSpeed, everything else around it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .. import devices
from ..config import Config
from ..data.reading.pairs import Pairs
from ..data.reading.train_loader import TrainLoader
from ..data.reading.training_set import TrainingSet
from ..data.scenes.folder import with_scenes
from ..data.text.tokenizer import Tokenizer
from ..errors import RankError, UserError
from ..files import write_json
from ..models import Batch, MixReorg, weights
from ..ranks import Ranks, mean_over_ranks, on_main, wait_patiently
from . import checkpoint, run_folder, validation
from .data import BadSamples, open_training_set
from .distributed import import_deepspeed, initialise
from .guard import StepGuard
from .metrics import MetricsLog
from .optimisation import deepspeed_config, learning_rate, optimizer, schedule_length
from .plots import draw_losses
from .preparation import check_inputs, prepare
from .summary import closing, expected, opening, summary
from .timing import RankTimes, Stopwatch
from .watch import FINISHED, StopRequest, Watch


def train(config: Config, resume: str = "auto", device: str | None = None) -> dict[str, Any]:
    """Train as `config` says and leave the run folder; returns the final scores.

    Args:
        resume: "auto" goes on from the newest complete checkpoint of the run folder, "never" sets what is there aside
            and starts anew, a path goes on from that checkpoint.
        device: "cpu" or "cuda"; None: the GPUs, or the CPU of a machine without.
    Raises:
        UserError: on every rank, with the same text.

    SIGTERM ends the run at the next step with a checkpoint; what it returns is then empty. After SIGINT (Ctrl-C) it
    does the same and raises KeyboardInterrupt. A run that is finished is left as it is.
    """
    ranks = initialise(device)
    if config.train.cuda_graphs and ranks.device.type != "cuda":
        raise UserError("train.cuda_graphs needs a CUDA GPU")
    if ranks.device.type == "cuda":
        devices.set_tf32(config.train.tf32)
    if ranks.is_main:
        print(summary(config, ranks), flush=True)
    on_main(lambda: run_folder.refuse_another(config, resume))
    scores = on_main(lambda: run_folder.finished(config, resume))
    if scores is not None:
        if ranks.is_main:
            print(f"{config.run_folder} is finished (--set train.steps=N for more, --resume never to start anew)")
            print(closing(scores, config), flush=True)
        return scores
    on_main(lambda: check_inputs(config, bool(checkpoint.find(config.run_folder, resume)), ranks.size))
    source, state = on_main(lambda: run_folder.checkpoint_to_resume(config, resume))
    config = on_main(lambda: with_scenes(config))
    training_set = open_training_set(config, ranks)
    config = on_main(lambda: prepare(config, training_set, resuming=source is not None))
    with Watch(ranks, config.train.timeout, config.run_folder) as watch:
        return Trainer(config, training_set, ranks, source, state).run(watch)


def micro_step_seed(seed: int, position: int) -> int:
    """Seed of the micro-step whose first image (over all ranks) is number `position` of the run; below 2**62."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class Trainer:
    """One run on one rank, new or going on from the checkpoint `source` with its `state`."""

    def __init__(
        self, config: Config, training_set: TrainingSet, ranks: Ranks, source: Path | None, state: dict[str, Any]
    ):
        self.config, self.training_set, self.ranks = config, training_set, ranks
        self.run_folder = config.run_folder
        self.tokenizer = Tokenizer.load(self.run_folder / weights.TOKENIZER)
        self.steps, self.warmup = schedule_length(config, len(training_set))
        self.micro_batch = config.micro_batch(ranks.size)
        self.step, self.best = state.get("step", 0), state.get("best")
        self._grad_cache = config.train.grad_cache and config.train.accumulation > 1
        self._shown: torch.Tensor | None = None
        self._told_time = False
        self.guard = StepGuard(config.train.spike, state.get("guard"))
        self._stage_0_norm = 0.0
        self._asked: torch.Tensor | None = None
        self._outcome: tuple[float, int] | None = None
        self._bad = BadSamples(config, ranks, training_set, self.step * config.train.batch)
        if ranks.is_main and state.get("order", training_set.digest) != training_set.digest:
            print("warning: data.shards are not what they were: from here on samples come in another order", flush=True)
        self._own_time, self._rank_times = Stopwatch(ranks.device), RankTimes(ranks, config.log.slow_rank)

        torch.manual_seed(config.seed)
        module = MixReorg(config)
        if source is not None:
            checkpoint.restore_weights(module, source)
        elif config.model.init is not None:
            weights.load_state(module.backbone, weights.find_weights(config.model.init))
        if ranks.is_main:
            print(opening(config, len(training_set), module, self.steps), flush=True)
        module.to(ranks.device)
        deepspeed = import_deepspeed()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer(module, config),
            config=deepspeed_config(config, ranks.size, on_gpu=ranks.device.type == "cuda"),
        )
        wait_patiently()
        self.optimizer.refuses = lambda: self.guard.refuses(self._read_outcome()[0])
        checkpoint.start_moments(self.engine)
        if source is not None:
            checkpoint.restore_moments(self.engine, source, self.guard.taken)
            if ranks.is_main:
                print(f"resumed from {source} at step {self.step}", flush=True)

    # ------------------------------------------------------------------ the loop

    def run(self, watch: Watch) -> dict[str, Any]:
        """Train to the last step, evaluate, draw; returns the final scores, none where SIGTERM ended it.

        Raises:
            KeyboardInterrupt: SIGINT ended it, with a checkpoint.
        """
        log: MetricsLog | None = None

        def open_log() -> None:
            nonlocal log
            log = MetricsLog(self.run_folder, self.step, self.steps, self.config.log.wandb)

        on_main(open_log)
        with _full_disk_in_one_line(self.run_folder):
            try:
                with (
                    _out_of_memory_in_one_line(self.config, self.micro_batch),
                    self._loader(self.step) as loader,
                    StopRequest() as stop,
                ):
                    images = self._loop(loader, log, watch, stop)
            finally:
                if log is not None:
                    log.close()
            watch.at(self.step, "final scores", timed=False)
            if self.ranks.is_main and draw_losses(self.run_folder) is None:
                print("no losses.png: it needs matplotlib", file=sys.stderr, flush=True)
            scores = {} if images is None else self._finish(images)
            watch.at(self.step, "stopped" if images is None else FINISHED)
        if images is None and self._outcome[1] == signal.SIGINT:
            raise KeyboardInterrupt
        return scores

    def _loader(self, step: int) -> TrainLoader:
        """Batches from `step` on."""
        return TrainLoader(
            self.config,
            self.training_set,
            self.tokenizer,
            micro_batch=self.micro_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            start=step * self.config.train.batch,
            device=self.ranks.device,
        )

    def _loop(
        self, loader: TrainLoader, log: MetricsLog | None, watch: Watch, stop: StopRequest
    ) -> torch.Tensor | None:
        """All remaining steps; returns images of the last micro-step, for the pictures, or None after a signal."""
        batches: Iterator[Pairs] = iter(loader)
        window = _Window(loader, self._own_time)
        # The texts' projection is the first exchange between ranks: who has not come here is who the others wait for.
        self.engine.module.backbone.text_projection.register_forward_pre_hook(lambda *_: self._at_exchange(watch))
        self.engine.train()
        # The loss over a whole step is handed to the engine once, and divided by it like each of a micro-step's.
        weight = self.config.train.accumulation if self._grad_cache else 1
        while self.step < self.steps:
            self._set_learning_rate()
            self._outcome = None
            buffers = [buffer.clone() for buffer in self.engine.module.buffers()]
            losses = []
            for arguments in self._micro_steps(batches, watch):
                watch.at(self.step + 1, "forward and backward")
                out = self.engine(*arguments)
                self.engine.backward(out["loss"] * weight)
                if len(out) > 1:  # a recomputation has no losses of its own
                    losses.append({name: value.detach() for name, value in out.items()})
                if self.engine.is_gradient_accumulation_boundary():
                    watch.at(self.step + 1, "optimizer step")
                    self._measure_stage_0()
                    self._asked = stop.shared(self.ranks)
                self.engine.step()  # counts the micro-step; the optimizer's own step comes with the last
            norm, asked = self._read_outcome()
            self.step += 1
            if self.guard.record(norm):
                self._skip(norm, buffers, log)
                losses = []
            window.add(losses)
            if log is not None:
                log.step()
            stopped = bool(asked) and self.step < self.steps
            if self.step % self.config.train.log_every == 0 or self.step == self.steps or stopped:
                self._report(window, loader, log, norm)
            if self._due(self.config.eval.every) and not stopped:
                watch.at(self.step, "validation", timed=False)
                self._validate(log)
                window.restart()
            if self._due(self.config.checkpoint.every) or self.step == self.steps or stopped:
                watch.at(self.step, "writing a checkpoint")
                path = self._save()
                window.restart()
            if stopped:
                if log is not None:
                    log.say(f"stopped by {signal.Signals(asked).name}; the same command goes on from {path}")
                return None
        return next(batches).images if self._shown is None else self._shown

    def _micro_steps(self, batches: Iterator[Pairs], watch: Watch) -> Iterator[tuple]:
        """The arguments of each of the step's calls of the engine."""
        count = self.config.train.accumulation
        if not self._grad_cache:
            for _ in range(count):
                yield (self._next(batches, watch),)
            return
        *others, last = [self._next(batches, watch) for _ in range(count)]
        watch.at(self.step + 1, "features of the whole batch")
        with torch.no_grad():
            cached = [self.engine.module.features(batch).cached() for batch in others]
        yield last, cached  # the losses and, of the last micro-batch, all of its gradients
        for batch, features in zip(others, cached, strict=True):
            yield batch, (), features.gradients()

    def _next(self, batches: Iterator[Pairs], watch: Watch) -> Batch:
        watch.at(self.step + 1, "waiting for data")
        self._own_time.start()
        loaded = next(batches)
        self._shown = loaded.images
        return self._batch(loaded)

    def _at_exchange(self, watch: Watch) -> None:
        self._own_time.stop()
        watch.at(self.step + 1, "exchange between ranks")

    def _skip(self, norm: float, buffers: list[torch.Tensor], log: MetricsLog | None) -> None:
        """What is left to undo of a step that the optimizer did not take; too many in a row stop the run."""
        for buffer, before in zip(self.engine.module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        if log is not None:
            log.say(f"step {self.step} skipped: gradient norm {norm:.4g} ({self.guard.skipped} skipped so far)")
        if self.guard.in_a_row < self.config.train.max_skipped:
            return
        folder = self.run_folder / "skipped" / f"step_{self.step:08d}"
        on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        with self._loader(self.step - 1) as loader:  # batches are a function of their position
            for number in range(self.config.train.accumulation):
                batch = next(loader)
                name = f"rank_{self.ranks.rank:05d}_micro_{number:03d}"
                save_file({"images": batch.images.cpu(), "ids": batch.ids.cpu()}, folder / f"{name}.safetensors")
                write_json(folder / f"{name}.json", {"position": batch.position, "keys": batch.keys})
        raise UserError(
            f"step {self.step}: gradient norm {norm:.4g}; {self.guard.in_a_row} steps in a row were skipped "
            f"(train.max_skipped); the last one's batch is in {folder}, the last checkpoint is as it was"
        )

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0 and self.step < self.steps

    def _batch(self, loaded: Pairs) -> Batch:
        # Of the batch that the losses are over: the position of its first image in the run, and that of ours in it.
        first = self.ranks.rank * self.micro_batch
        if self._grad_cache:
            first = loaded.position - self.step * self.config.train.batch
        nouns = loaded.noun_ids
        device = self.ranks.device
        # Filled there, for a copy from the host would be waited for.
        seed = torch.full((), micro_step_seed(self.config.seed, loaded.position - first), device=device)
        return Batch(
            loaded.images.to(device, non_blocking=True),
            loaded.ids.to(device, non_blocking=True),
            loaded.lengths,
            seed,
            first,
            None if nouns is None else nouns.to(device, non_blocking=True),
            loaded.noun_lengths,
            self.step / self.steps,
        )

    def _set_learning_rate(self) -> None:
        settings = self.config.train
        rate = learning_rate(
            self.step, steps=self.steps, warmup=self.warmup, peak=settings.lr, floor=min(settings.min_lr, settings.lr)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _measure_stage_0(self) -> None:
        """Note the norm before clipping, which DeepSpeed keeps only from stage 1 on."""
        if self.engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self._stage_0_norm = torch.nn.utils.get_total_norm(gradients).item()

    def _read_outcome(self) -> tuple[float, int]:
        """The step's gradient norm before clipping and the signal that asked a rank to stop (0: none), both over all
        ranks.

        Read once a step, in the engine's step when the optimizer asks the guard: DeepSpeed has just waited for the
        gradients to look for infinities, so the GPU is not waited for again. After an overflow nobody asks.
        """
        if self._outcome is None:
            self._outcome = (self._norm(), int(self._asked))
        return self._outcome

    def _norm(self) -> float:
        if self.engine.zero_optimization_stage() == 0:
            return self._stage_0_norm
        wrapper = self.engine.optimizer
        return math.inf if wrapper.overflow else float(wrapper._global_grad_norm)

    # ------------------------------------------------------------------ reports, scores, checkpoints

    def _report(self, window: _Window, loader: TrainLoader, log: MetricsLog | None, norm: float) -> None:
        means = window.means(self.ranks)
        bad = self._bad.count(loader.bad_samples)
        seconds, waited = window.times(loader)
        steps = window.steps
        times = self._rank_times.gather(self._own_time.seconds() / steps)
        window.restart()
        if log is None:
            return
        images_per_s = steps * self.config.train.batch / seconds
        values = {
            "samples": self.step * self.config.train.batch,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": self.guard.skipped,
            "temperature": self.engine.module.backbone.logit_multiplier().item(),
            "images_per_s": images_per_s,
            "data_wait": waited / seconds,
            "rank_seconds": times,
            "peak_memory_mb": _peak_memory(self.ranks.device) / 2**20,
            "bad_samples": bad,
        }
        log.write(self.step, values)
        shown = {name: value for name, value in means.items() if name.startswith("loss")}
        left = (self.steps - self.step) * self.config.train.batch / images_per_s
        log.show(self.step, {**shown, "images/s": images_per_s}, left)
        if not self._told_time and self.step < self.steps:
            self._told_time = True
            log.say(expected(left, self.steps - self.step))
        if (ended := self._bad.remark(values["samples"])) is not None:
            log.say(ended)
        if (remark := self._rank_times.remark(times)) is not None:
            log.say(f"step {self.step}: {remark}")

    def _validate(self, log: MetricsLog | None) -> None:
        """Score a part of the evaluation data; keep the weights whose mean mIoU is the best so far."""
        state = checkpoint.portable_state(self.engine)
        model = validation.evaluation_model(self.config, self.tokenizer, state, self.ranks)
        scores = validation.score(model, self.config, self.ranks, limit=self.config.eval.every_images)
        figures = validation.headline(scores)
        values = [value["mIoU"] for value in scores.values() if "mIoU" in value]
        mean = sum(values) / len(values) if values else None
        better = mean is not None and (self.best is None or mean > self.best)
        if better:
            self.best = mean
        if log is not None and figures:
            log.write(self.step, {"validation": figures})
            log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
            if better:
                model.save(self.run_folder / "best")

    def _save(self) -> Path:
        state = {
            "samples": self.step * self.config.train.batch,
            "guard": self.guard.state(),
            "seed": self.config.seed,
            "batch": self.config.train.batch,
            "order": self.training_set.digest,
            "best": self.best,
        }
        keep = self.config.checkpoint.keep
        return checkpoint.save(self.run_folder, self.step, self.engine, self.ranks, state, keep, self.tokenizer)

    def _finish(self, images: torch.Tensor) -> dict[str, Any]:
        state = checkpoint.portable_state(self.engine)
        model = validation.evaluation_model(self.config, self.tokenizer, state, self.ranks)
        scores = validation.score(model, self.config, self.ranks, limit=None)
        if self.ranks.is_main:
            if scores:
                write_json(self.run_folder / "eval.json", scores)
            validation.draw(model, self.config, images, self.run_folder)
            print(closing(scores, self.config), flush=True)
        return scores


class _Window:
    """Means and times since the last report. Sums stay on the device, so that steps need not wait for them."""

    def __init__(self, loader: TrainLoader, own_time: Stopwatch):
        self._loader, self._own_time = loader, own_time
        self.restart()

    def restart(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._added = self.steps = 0
        self._start, self._waited = time.perf_counter(), self._loader.wait_seconds
        self._own_time.restart()

    def add(self, losses: list[dict[str, torch.Tensor]]) -> None:
        """Count a step with the losses of its micro-steps, none if it was skipped."""
        for each in losses:
            for name, value in each.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._added += len(losses)
        self.steps += 1

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Means over the window's micro-steps and all ranks; empty if every step was skipped."""
        if not self._added:
            return {}
        sums = torch.stack(list(self._sums.values())).float() / self._added
        return dict(zip(self._sums, mean_over_ranks(sums).tolist(), strict=True))

    def times(self, loader: TrainLoader) -> tuple[float, float]:
        """Seconds since the window began, and those of them spent waiting for data."""
        return time.perf_counter() - self._start, loader.wait_seconds - self._waited


@contextlib.contextmanager
def _full_disk_in_one_line(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankError(f"{run} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _out_of_memory_in_one_line(config: Config, micro_batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        settings = config.train
        groups = micro_batch * settings.accumulation // config.group_size
        splits = [n for n in range(settings.accumulation + 1, groups + 1) if groups % n == 0]
        choices = [f"train.accumulation={splits[0]} with train.grad_cache=true"] if splits else []
        if not settings.checkpoint_activations:
            choices.append("train.checkpoint_activations=true")
        choices.append(f"a train.batch below {settings.batch}")
        raise RankError(
            f"out of memory with {micro_batch} images per rank and micro-step; set {', or '.join(choices)}"
        ) from error


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
