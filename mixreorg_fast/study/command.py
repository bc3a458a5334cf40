"""Train a table of variants on equal budgets and write their scores.

Every run is a training process of its own. The same command resumes an interrupted study: finished runs stay, an
interrupted run resumes from its checkpoint. The scores go into ``RESULTS/study_<device>.json``, from there into the
tables of ``DOCS/results.md``; curves and pictures go into ``DOCS/images/``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from .. import devices, ledger
from ..config import load_config
from ..errors import UserError
from ..files import write_json
from ..training.reports import read_metrics
from . import report
from .plan import Run, Study

FINISHED = "finished"


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
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    study = Study(args.study, args.block)
    if args.list:
        for waiting, run in planned(study):
            print(f"{'to measure':12} {waiting}" if run is None else f"{_state(run):12} {run.folder}")
        return
    with Runner(args.jobs, devices.choose(args.device).type) as runner:
        try:
            failed = runner.train(study)
        finally:
            _report(study, args)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {', '.join(f'{run.folder}.log' for run in failed)}")


def planned(study: Study) -> Iterator[tuple[str, Run | None]]:
    """The runs in their order; one with a budget of time follows the two runs that its number of steps comes from.

    Until these are finished the run is None, and the text says what is to be measured.
    """
    timed, passed = list(study.timed), set()
    for run in study.runs:
        yield "", run
        passed.add((run.dataset, run.variant, run.seed))
        for each in list(timed):
            dataset, variant, like, seed = each
            if {(dataset, variant, seed), (dataset, like, seed)} <= passed:
                timed.remove(each)
                yield f"{variant} on {dataset}, seed {seed}, for as long as {like} takes", _timed_run(study, *each)


def _timed_run(study: Study, dataset: str, variant: str, like: str, seed: int) -> Run | None:
    """The run of as many steps as fit into the time of `like` with the same seed; None until both are finished."""
    own, other = study.run(dataset, variant, seed), study.run(dataset, like, seed)
    if not (_state(own) == _state(other) == FINISHED):
        return None
    own_steps = own.config.train.steps
    assert own_steps is not None, "a finished run has its number of steps"
    return study.run(dataset, variant, seed, steps=round(_seconds(other) / (_seconds(own) / own_steps)))


def _state(run: Run) -> str:
    """FINISHED or "begun" if the run's folder was made with this configuration, else "to train"."""
    with contextlib.suppress(UserError):
        if run.folder.is_dir() and load_config(run.request) == run.config:
            return FINISHED if (run.folder / "eval.json").is_file() else "begun"
    return "to train"


def _seconds(run: Run) -> float:
    return report.training_seconds([line for line in read_metrics(run.folder) if "loss" in line])


class Runner:
    """Trains runs on `device` ("cpu" or "cuda"), `jobs` at a time. Each is a process with a share of the processors and
    one GPU.

    The runs receive SIGTERM and SIGINT, write a checkpoint and end.
    """

    def __init__(self, jobs: int, device: str):
        self.jobs, self.device = jobs, device
        self._processors = sorted(os.sched_getaffinity(0))
        self._processes: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def __enter__(self) -> Runner:
        self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def train(self, study: Study) -> list[Run]:
        """Train the unfinished runs; returns those that failed. Runs that depend on these are left out.

        A signal ends the study with a UserError.
        """
        failed, begun = [], set()
        free, busy = list(range(self.jobs)), {}
        with ThreadPoolExecutor(self.jobs) as pool:
            while not self._stopped.is_set():
                for _, run in planned(study):
                    if free and run is not None and run.folder not in begun:
                        begun.add(run.folder)
                        worker = free.pop(0)
                        busy[pool.submit(self._train, worker, run)] = worker, run
                if not busy:
                    break
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    worker, run = busy.pop(future)
                    free.append(worker)
                    failed += [] if future.result() else [run]
        if self._stopped.is_set():
            raise UserError("stopped; the same command resumes the study")
        return failed

    def _train(self, worker: int, run: Run) -> bool:
        """Train a run unless it is finished; returns whether it is."""
        state = _state(run)
        if state == FINISHED or self._stopped.is_set():
            return state == FINISHED
        resume = "auto" if state == "begun" else "never"
        if resume == "never":
            write_json(run.request, run.config.model_dump(mode="json"))
        log = run.folder.with_name(f"{run.folder.name}.log")
        environment = dict(os.environ)
        if self.device == "cuda" and "CUDA_VISIBLE_DEVICES" not in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = str(worker % torch.cuda.device_count())
        arguments = [sys.executable, "-m", "mixreorg_fast.training.command", "--config", str(run.request)]
        arguments += ["--resume", resume, "--device", self.device]
        os.sched_setaffinity(0, _shares(self._processors, self.jobs)[worker])  # of this thread and its child processes
        start = time.monotonic()
        print(f"training  {run.folder}", flush=True)
        with log.open("ab") as output:
            # In a session of its own, so that a terminal's Ctrl-C reaches it only from here.
            process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment, start_new_session=True)
            self._processes.add(process)
            if self._stopped.is_set():  # a signal came after the check in the loop
                process.terminate()
            code = process.wait()
            self._processes.discard(process)
        well = code == 0 and _state(run) == FINISHED
        if well:
            scores = ", ".join(f"{row['world']} {row['miou']:.2f}" for row in report.rows_of(run.folder))
            print(f"finished  {run.folder} in {time.monotonic() - start:.0f} s: {scores}", flush=True)
        elif not self._stopped.is_set():
            print(f"failed    {run.folder} (exit code {code}): {_last_line(log)}", file=sys.stderr, flush=True)
        return well

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
    runs = [run for _, run in planned(study) if run is not None and _state(run) == FINISHED]
    if not runs:
        return
    runs.sort(key=lambda run: run.budget)  # those with a budget of time come last in tables
    rows = []
    for run in runs:
        about = {"study": run.study, "trained_on": run.dataset, "variant": run.variant, "budget": run.budget}
        rows += report.rows_of(run.folder, **about, about=config.variants[run.variant].about)
    path = report.results_file(args.results)
    report.write_study_rows(rows, path, f"mixreorg study {args.study}", {config.name: study.names()})
    labels = {name: variant.about for name, variant in config.variants.items()}
    for dataset in dict.fromkeys(run.dataset for run in runs) if config.pictures else ():
        of_dataset = [run for run in runs if run.dataset == dataset]
        curves, pictures = (
            args.docs / report.PICTURES / report.picture_name(ledger.device_name(), config.name, dataset, kind)
            for kind in ("curves", "pictures")
        )
        report.curves_figure(of_dataset, labels, curves)
        first = {(run.variant, run.budget): run for run in reversed(of_dataset)}  # the first seed of each
        columns = [run for run in of_dataset if first[run.variant, run.budget] is run and run.budget == "steps"]
        report.pictures_figure(columns, labels, pictures, config.pictures)
    report.write_page(args.results, args.docs)
    print(f"results: {path}, {args.docs / 'results.md'}", flush=True)
