"""Train a table of variants on equal budgets and write their scores.

Every run is a training process of its own. The same command resumes an interrupted study: finished runs stay, an
interrupted run resumes from its checkpoint. The scores go into ``RESULTS/study_<device>.json``, from there into the
tables of ``DOCS/results.md``; curves and pictures go into ``DOCS/images/``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from .. import devices, ledger
from ..errors import UserError
from ..files import write_json
from .plan import Run, Study
from .report import PICTURES, curves_figure, picture_name, pictures_figure, write_page
from .rows import read_metrics, results_file, rows_of, training_seconds, write_study_rows

Entry = Callable[[], Run | None]  # gives a run to train; None while its number of steps is unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="FILE", help="the study, such as configs/study.json")
    parser.add_argument("--block", action="append", default=[], metavar="NAME", help="only this block; repeatable")
    parser.add_argument("--list", action="store_true", help="list the runs and their state; train nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPUs, or the CPU of a machine without")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="FOLDER")


def main(args: argparse.Namespace) -> None:
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1")
    study = Study(args.study, args.block)
    if args.list:
        _list(study)
        return
    with Runner(args.jobs, devices.choose(args.device).type) as runner:
        try:
            failed = runner.train(_entries(study))
        finally:
            _report(study, args)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {', '.join(f'{run.folder}.log' for run in failed)}")


def _list(study: Study) -> None:
    for run in study.runs():
        print(f"{_state(run):12} {run.folder}")
    for dataset, variant, like, seed in study.timed():
        run = _timed_run(study, dataset, variant, like, seed)
        if run is None:
            print(f"{'to measure':12} {variant} on {dataset}, seed {seed}, for as long as {like} takes")
        else:
            print(f"{_state(run):12} {run.folder}")


def _state(run: Run) -> str:
    if _finished(run):
        return "finished"
    return "begun" if run.folder.is_dir() and _begun(run) else "to train"


def _begun(run: Run) -> bool:
    """Whether the run folder belongs to this very run."""
    from ..config import load_config

    try:
        return load_config(run.request) == run.config
    except UserError:
        return False


def _finished(run: Run) -> bool:
    return (run.folder / "eval.json").is_file() and _begun(run)


def _timed_run(study: Study, dataset: str, variant: str, like: str, seed: int) -> Run | None:
    """The run of as many steps as fit into the time of `like` with the same seed; None until both are finished."""
    own, other = study.run(dataset, variant, seed), study.run(dataset, like, seed)
    if not (_finished(own) and _finished(other)):
        return None
    assert own.config.train.steps is not None, "a finished run has its number of steps"
    per_step = _seconds(own) / own.config.train.steps
    return study.run(dataset, variant, seed, steps=round(_seconds(other) / per_step))


def _entries(study: Study) -> list[Entry]:
    """The runs to train, in order; a run with a budget of time comes as soon as that time is known."""
    runs = list(study.runs())
    place = {(run.dataset, run.variant, run.seed): number for number, run in enumerate(runs)}
    entries: list[tuple[int, bool, Entry]] = [(number, False, lambda run=run: run) for number, run in enumerate(runs)]
    for dataset, variant, like, seed in study.timed():
        last = max(place[dataset, variant, seed], place[dataset, like, seed])
        entries.append((last, True, partial(_timed_run, study, dataset, variant, like, seed)))
    return [entry for *_, entry in sorted(entries, key=lambda entry: entry[:2])]


def _seconds(run: Run) -> float:
    return training_seconds([line for line in read_metrics(run.folder) if "loss" in line])


class Runner:
    """Trains runs on `device` ("cpu" or "cuda"), `jobs` at a time. Each is a process with a share of the processors and
    one GPU.

    The runs receive SIGTERM and SIGINT, write a checkpoint and end.
    """

    def __init__(self, jobs: int, device: str):
        self.jobs, self.device = jobs, device
        self._processes: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def __enter__(self) -> Runner:
        self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def train(self, entries: Sequence[Entry]) -> list[Run]:
        """Train the unfinished runs; returns the runs that failed. Runs that depend on these are left out.

        Raises:
            UserError: a signal ended the study.
        """
        todo, failed = list(entries), []
        changed, running = threading.Condition(), 0
        shares = _shares(sorted(os.sched_getaffinity(0)), self.jobs)

        def work(worker: int) -> None:
            nonlocal running
            os.sched_setaffinity(0, shares[worker])  # of this thread and its child processes
            while not self._stopped.is_set():
                with changed:
                    place, run = next(((i, run) for i, entry in enumerate(todo) if (run := entry())), (0, None))
                    if run is None:
                        if not running:
                            return
                        changed.wait()
                        continue
                    del todo[place]
                    running += 1
                well = _finished(run) or self._train(worker, run)
                with changed:
                    running -= 1
                    if not well:
                        failed.append(run)
                    changed.notify_all()

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(work, range(self.jobs)))
        if self._stopped.is_set():
            raise UserError("stopped; the same command resumes the study")
        return failed

    def _train(self, worker: int, run: Run) -> bool:
        resume = "auto" if _begun(run) else "never"
        if resume == "never":
            write_json(run.request, run.config.model_dump(mode="json"))
        log = run.folder.with_name(f"{run.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [sys.executable, "-m", "mixreorg_fast.training", "--config", str(run.request)]
        arguments += ["--resume", resume, "--device", self.device]
        start = time.monotonic()
        print(f"training  {run.folder}", flush=True)
        with log.open("ab") as output:
            # In a session of its own, so that a terminal's Ctrl-C reaches it only from here.
            process = subprocess.Popen(
                arguments, stdout=output, stderr=output, env=self._environment(worker), start_new_session=True
            )
            self._processes.add(process)
            if self._stopped.is_set():  # a signal came after the check in the loop
                process.terminate()
            code = process.wait()
            self._processes.discard(process)
        well = code == 0 and _finished(run)
        if well:
            scores = ", ".join(f"{row['world']} {row['miou']:.2f}" for row in rows_of(run.folder))
            print(f"finished  {run.folder} in {time.monotonic() - start:.0f} s: {scores}", flush=True)
        elif not self._stopped.is_set():
            print(f"failed    {run.folder} (exit code {code}): {_last_line(log)}", file=sys.stderr, flush=True)
        return well

    def _environment(self, worker: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.device == "cuda" and "CUDA_VISIBLE_DEVICES" not in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = str(worker % torch.cuda.device_count())
        return environment

    def _stop(self, *_) -> None:
        self._stopped.set()
        for process in list(self._processes):
            process.terminate()


def _shares(processors: Sequence[int], jobs: int) -> list[Sequence[int]]:
    """The processors of each worker. A run starts a thread per processor, and threads of several runs on the same
    processors would slow each other down."""
    return [processors[worker::jobs] or processors for worker in range(jobs)]


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")


def _report(study: Study, args: argparse.Namespace) -> None:
    """Write rows, page, curves and pictures of all finished runs."""
    config = study.config
    timed = (_timed_run(study, *each) for each in study.timed())
    runs = [run for run in [*study.runs(), *filter(None, timed)] if _finished(run)]
    if not runs:
        return
    rows = []
    for run in runs:
        about = {"study": run.study, "trained_on": run.dataset, "variant": run.variant, "budget": run.budget}
        rows += rows_of(run.folder, **about, about=config.variants[run.variant].about)
    path = results_file(args.results)
    write_study_rows(rows, path, f"mixreorg study {args.study}", {config.name: study.names()})
    labels = {name: variant.about for name, variant in config.variants.items()}
    for dataset in dict.fromkeys(run.dataset for run in runs) if config.pictures else ():
        of_dataset = [run for run in runs if run.dataset == dataset]
        curves, pictures = (
            args.docs / PICTURES / picture_name(ledger.device_name(), config.name, dataset, kind)
            for kind in ("curves", "pictures")
        )
        curves_figure(of_dataset, labels, curves)
        first = {(run.variant, run.budget): run for run in reversed(of_dataset)}  # the first seed of each
        columns = [run for run in of_dataset if first[run.variant, run.budget] is run and run.budget == "steps"]
        pictures_figure(columns, labels, pictures, config.pictures)
    write_page(args.results, args.docs)
    print(f"results: {path}, {args.docs / 'results.md'}", flush=True)
