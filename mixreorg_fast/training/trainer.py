"""The training loop: micro-steps under DeepSpeed, reports, validations, checkpoints."""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import devices
from ..config import Config
from ..data.reading.loaders import Pairs, TrainLoader
from ..data.reading.training_set import TrainingSet
from ..data.scenes.folder import with_scenes
from ..data.text.tokenizer import Tokenizer
from ..errors import UserError
from ..files import write_json
from ..inference.formats import read
from ..inference.hub import pinned
from ..inference.model import Model
from ..models import Batch, MixReorg, weights
from ..models.features import Features
from ..ranks import Ranks, on_main, wait_patiently
from . import checkpoint, preparation, validation
from .data import BadSamples, open_training_set
from .distributed import full_disk_in_one_line, import_deepspeed, initialise, out_of_memory_in_one_line
from .optimisation import StepGuard, deepspeed_config, learning_rate, optimizer, schedule_length
from .plots import draw_losses
from .reports import Reports
from .summary import closing, opening, summary
from .watch import FINISHED, StopRequest, Watch


def train(config: Config, resume: str = "auto", device: str | None = None) -> dict[str, Any]:
    """Train as `config` says and leave the run folder; returns the final scores.

    Args:
        resume: "auto" resumes from the newest complete checkpoint of the run folder; "never" renames an existing run
            folder and starts a new run; a path resumes from that checkpoint.
        device: "cpu" or "cuda"; None: the GPUs, or the CPU of a machine without GPUs.
    Raises:
        UserError: on every rank, with the same text; a RankError on one rank alone.

    SIGTERM ends the run after the current step with a checkpoint, and the returned scores are empty. SIGINT (Ctrl-C)
    does the same and raises KeyboardInterrupt. A finished run does not change.
    """
    ranks = initialise(device)
    if ranks.device.type == "cuda":
        devices.set_tf32(config.train.tf32)
    elif config.train.cuda_graphs:
        raise UserError("train.cuda_graphs needs a CUDA GPU")
    config = on_main(lambda: preparation.with_precision(config, resume, ranks.device))
    if ranks.is_main:
        print(summary(config, ranks), flush=True)
    on_main(lambda: preparation.refuse_another(config, resume))
    scores = on_main(lambda: preparation.finished(config, resume))
    if scores is not None:
        if ranks.is_main:
            print(f"{config.run_folder} is finished (--set train.steps=N for more, --resume never for a new run)")
            print(closing(scores, config), flush=True)
        return scores
    on_main(lambda: preparation.check_inputs(config, bool(checkpoint.find(config.run_folder, resume)), ranks.size))
    state = on_main(lambda: preparation.state_to_resume(config, resume))
    config = on_main(lambda: with_scenes(config))
    training_set = open_training_set(config, ranks, state)
    start = None
    if config.model.init is not None and not state:
        start = on_main(lambda: pinned(str(config.model.init)))  # one commit for weights and tokenizer, on all ranks
    config = on_main(lambda: preparation.prepare(config, training_set, bool(state), start))
    if ranks.is_main and state.get("order", training_set.digest) != training_set.digest:
        print("warning: data.shards have changed: the samples' order changes from here on", flush=True)
    with Watch(ranks, config.train.timeout, config.run_folder) as watch:
        return Trainer(config, training_set, ranks, watch, state, start).run()


def micro_step_seed(seed: int, position: int) -> int:
    """Seed of the micro-step whose first image (over all ranks) is number `position` of the run; below 2**62."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class Trainer:
    """One run on one rank.

    Args:
        state: of the checkpoint to resume from, whose path is its "source"; {}: a new run.
        start: the weights that a new run starts from; None: random ones.
    """

    def __init__(
        self,
        config: Config,
        training_set: TrainingSet,
        ranks: Ranks,
        watch: Watch,
        state: dict[str, Any],
        start: str | None = None,
    ):
        self.config, self.training_set, self.ranks, self.watch = config, training_set, ranks, watch
        self.run_folder = config.run_folder
        self.tokenizer = Tokenizer.load(self.run_folder / weights.TOKENIZER)
        self.steps, self.warmup = schedule_length(config, len(training_set))
        self.micro_batch = config.micro_batch(ranks.size)
        self.step, self.best = state.get("step", 0), state.get("best")
        self.guard = StepGuard(config.train.spike, **state.get("guard", {}))
        self.grad_cache = config.train.grad_cache and config.train.accumulation > 1
        bad_samples = BadSamples(config, ranks, training_set, self.step * config.train.batch)
        self.reports = Reports(config, ranks, bad_samples, self.step, self.steps)
        self._images: Tensor | None = None  # of the last micro-batch, for the pictures
        self.engine = self._engine(state.get("source"), start)

    def _engine(self, source: Path | None, start: str | None) -> Any:
        """DeepSpeed's engine around the network and its optimizer, restored from the checkpoint `source`."""
        config, ranks = self.config, self.ranks
        torch.manual_seed(config.seed)
        module = MixReorg(config)
        if source is not None:
            checkpoint.restore_weights(module, source)
        elif start is not None:
            weights.fill(module.backbone, read(start).state, start)
        if ranks.is_main:
            print(opening(config, len(self.training_set), module, self.steps), flush=True)
        module.to(ranks.device)
        steps = optimizer(module, config, self.guard)
        settings = deepspeed_config(config, ranks.size, on_gpu=ranks.device.type == "cuda")
        engine, *_ = import_deepspeed().initialize(model=module, optimizer=steps, config=settings)
        wait_patiently()
        steps.lay_out(engine)
        checkpoint.start_moments(engine)
        if source is not None:
            checkpoint.restore_moments(engine, source, self.guard.taken)
            if ranks.is_main:
                print(f"resumed from {source} at step {self.step}", flush=True)
        return engine

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate, draw; signals and the result are those of :func:`train`."""
        with full_disk_in_one_line(self.run_folder):
            with (
                self.reports,
                out_of_memory_in_one_line(self.config, self.micro_batch),
                self._loader(self.step) as loader,
                StopRequest() as stop,
            ):
                stopped_by = self._loop(loader, stop)
                images = next(loader).images if self._images is None else self._images
            self.watch.at(self.step, "final scores", timed=False)
            if self.ranks.is_main and not draw_losses(self.run_folder):
                print("no losses.png: it needs matplotlib", file=sys.stderr, flush=True)
            scores = {} if stopped_by else self._finish(images)
            self.watch.at(self.step, "stopped" if stopped_by else FINISHED)
        if stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        return scores

    def _loop(self, loader: TrainLoader, stop: StopRequest) -> int:
        """All remaining steps; returns the signal that ended the run early, 0 for none."""
        batches = self._batches(loader)
        forward_and_backward = self._grad_cached if self.grad_cache else self._plain
        self.engine.train()
        while self.step < self.steps:
            self._set_learning_rate()
            buffers = [buffer.clone() for buffer in self.engine.module.buffers()]

            losses = forward_and_backward(itertools.islice(batches, self.config.train.accumulation))
            self.watch.at(self.step + 1, "optimizer step")
            norm, asked = self.guard.take(self.engine, stop, self.ranks)
            self.step += 1
            if self.guard.record(norm):
                self._skip(norm, buffers)
                losses = []

            self.reports.add(losses)
            stopped_by = asked if self.step < self.steps else 0
            if self.step % self.config.train.log_every == 0 or self.step == self.steps or stopped_by:
                self._report(loader, norm)
            if self._due(self.config.eval.every) and not stopped_by:
                self.watch.at(self.step, "validation", timed=False)
                self._validate()
                self.reports.restart()
            if self._due(self.config.checkpoint.every) or self.step == self.steps or stopped_by:
                self.watch.at(self.step, "writing a checkpoint")
                path = self._save()
                self.reports.restart()
            if stopped_by:
                name = signal.Signals(stopped_by).name
                self.reports.say(f"stopped by {name}; the same command resumes from {path}")
                return stopped_by
        return 0

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0 and self.step < self.steps

    # ------------------------------------------------------------------ batches

    def _loader(self, step: int) -> TrainLoader:
        """The loader of micro-batches, from `step` on."""
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

    def _batches(self, loader: TrainLoader) -> Iterator[Batch]:
        """Micro-batches as the network takes them."""
        batches = iter(loader)
        while True:
            # No timeout while remote shards are fetched: data.cache.patience limits that wait.
            self.watch.at(self.step + 1, "waiting for data", timed=not self.training_set.is_remote)
            with self.reports.waiting_for_data():
                pairs = next(batches)
            self._images = pairs.images
            yield self._batch(pairs)

    def _batch(self, pairs: Pairs) -> Batch:
        # The losses are over the micro-step's images of all ranks, with GradCache over the whole step's.
        first = self.ranks.rank * self.micro_batch
        if self.grad_cache:
            first = pairs.position - self.step * self.config.train.batch
        # Filled on the device, so that the host does not wait for a copy.
        seed = torch.full((), micro_step_seed(self.config.seed, pairs.position - first), device=self.ranks.device)
        done = self.step / self.steps
        return Batch(pairs.images, pairs.ids, pairs.lengths, seed, first, pairs.noun_ids, pairs.noun_lengths, done)

    # ------------------------------------------------------------------ forward and backward

    def _plain(self, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
        """Forward and backward of each micro-batch on its own; returns losses and measures of each."""
        return [self._micro_step(batch) for batch in batches]

    def _grad_cached(self, batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
        """Forward and backward of losses over the whole step's batch (GradCache, Gao et al., 2021).

        First the features of all micro-batches, without a graph; then the losses, whose backward ends in these
        features; last a second forward of each micro-batch, whose backward begins with its features' gradients.
        """
        *others, last = batches
        self.watch.at(self.step + 1, "features of the whole batch")
        with torch.no_grad():
            cached = [self.engine.module.features(batch).cached() for batch in others]
        losses = self._micro_step(last, cached)  # the last micro-batch's features keep their graph
        for batch, features in zip(others, cached, strict=True):
            self._micro_step(batch, gradients=features.gradients())
        return [losses]

    def _micro_step(
        self, batch: Batch, others: Sequence[Features] = (), gradients: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One call of the engine's forward and backward; the arguments are those of :meth:`MixReorg.forward`."""
        self.watch.at(self.step + 1, "forward and backward")
        out = self.engine(batch, others, gradients, at_exchange=self._at_exchange)
        # The engine divides every loss by the number of micro-steps. GradCache's loss is over the whole step already.
        self.engine.backward(out["loss"] * (self.config.train.accumulation if self.grad_cache else 1))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-step
        return {name: value.detach() for name, value in out.items()}

    def _at_exchange(self) -> None:
        """Note that this rank has reached the step's first exchange, where ranks wait for one another."""
        self.reports.at_exchange()
        self.watch.at(self.step + 1, "exchange between ranks")

    # ------------------------------------------------------------------ the optimizer's step

    def _set_learning_rate(self) -> None:
        peak, floor = self.config.train.lr, min(self.config.train.min_lr, self.config.train.lr)
        rate = learning_rate(self.step, steps=self.steps, warmup=self.warmup, peak=peak, floor=floor)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def _skip(self, norm: float, buffers: list[Tensor]) -> None:
        """Restore the network's buffers after a skipped step; too many in a row end the run in a UserError."""
        for buffer, before in zip(self.engine.module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.reports.say(f"step {self.step} skipped: gradient norm {norm:.4g} ({self.guard.skipped} skipped so far)")
        if self.guard.in_a_row < self.config.train.max_skipped:
            return
        folder = self.run_folder / "skipped" / f"step_{self.step:08d}"
        on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        with self._loader(self.step - 1) as loader:  # batches are a function of their position
            for number in range(self.config.train.accumulation):
                pairs = next(loader)
                name = f"rank_{self.ranks.rank:05d}_micro_{number:03d}"
                save_file({"images": pairs.images.cpu(), "ids": pairs.ids.cpu()}, folder / f"{name}.safetensors")
                write_json(folder / f"{name}.json", {"position": pairs.position, "keys": pairs.keys})
        raise UserError(
            f"step {self.step}: gradient norm {norm:.4g}; {self.guard.in_a_row} steps in a row were skipped "
            f"(train.max_skipped); the last step's batch is in {folder}; the last checkpoint is unchanged"
        )

    # ------------------------------------------------------------------ reports, scores, checkpoints

    def _report(self, loader: TrainLoader, norm: float) -> None:
        measures = {
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": self.guard.skipped,
            "temperature": self.engine.module.backbone.logit_multiplier().item(),
        }
        self.reports.write(self.step, loader.bad_samples, measures)

    def _score(self, limit: int | None) -> tuple[Model, dict[str, Any]]:
        """A copy of the network for evaluation, and its scores on `limit` images of each dataset (None: all)."""
        model = Model(self.config.model, tokenizer=self.tokenizer, inference=self.config.inference)
        model.load_state_dict(checkpoint.portable_state(self.engine))
        model.to(self.ranks.device).eval()
        return model, validation.score(model, self.config, self.ranks, limit=limit)

    def _validate(self) -> None:
        """Score a part of the evaluation data; keep the weights with the best mean mIoU so far."""
        model, scores = self._score(self.config.eval.every_images)
        self.reports.validation(self.step, validation.headline(scores))
        values = [value["mIoU"] for value in scores.values() if "mIoU" in value]
        mean = sum(values) / len(values) if values else -math.inf
        if mean > (-math.inf if self.best is None else self.best):
            self.best = mean
            if self.ranks.is_main:
                model.save(self.run_folder / "best")

    def _finish(self, images: Tensor) -> dict[str, Any]:
        """Score all evaluation data and draw the pictures, some of them of training `images`."""
        model, scores = self._score(None)
        if self.ranks.is_main:
            if scores:
                write_json(self.run_folder / "eval.json", scores)
            validation.draw(model, self.config, images, self.run_folder)
            print(closing(scores, self.config), flush=True)
        return scores

    def _save(self) -> Path:
        state = {
            "step": self.step,
            "samples": self.step * self.config.train.batch,
            "guard": self.guard.state(),
            "seed": self.config.seed,
            "batch": self.config.train.batch,
            "optimizer": self.config.train.optimizer,
            "order": self.training_set.digest,
            "remote": self.training_set.counts,
            "best": self.best,
        }
        return checkpoint.save(self.run_folder, self.engine, state, self.config.checkpoint.keep, self.tokenizer)
