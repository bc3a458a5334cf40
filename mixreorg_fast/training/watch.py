"""Signals to stop, a watch for hung ranks and dead launchers, and the heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch.distributed import HashStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..files import write_json
from ..ranks import Ranks, max_over_ranks, on_main

FINISHED = "finished"  # the place of a run with final scores
REPEAT = 1.0  # seconds within which a repeated signal counts as one

_LAUNCHERS = {"mixreorg", "deepspeed", "ds", "torchrun"}  # programs
_LAUNCHERS |= {"deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch"}  # modules


class StopRequest:
    """Remembers SIGTERM, which clusters send before they take a node away, or SIGINT (Ctrl-C) until the step's end.

    A second signal of the same kind ends the process at once, unless it comes within REPEAT seconds: torchrun passes a
    terminal's Ctrl-C on to ranks to which the terminal has sent it already.
    """

    def __enter__(self) -> StopRequest:
        self.asked = 0  # the first signal's number
        self._since: dict[int, float] = {}
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if time.monotonic() - self._since.setdefault(number, time.monotonic()) > REPEAT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def shared(self, ranks: Ranks) -> torch.Tensor:
        """The signal that a rank has received, 0 for none, the same on every rank; 0-d int32 on the device."""
        # Filled on the device, so that the host does not wait for a copy.
        return max_over_ranks(torch.full((), self.asked, dtype=torch.int32, device=ranks.device))


class Watch:
    """A thread beside the loop, as a context manager.

    After `timeout` seconds without progress of any rank it ends the process with one line, which names the rank that
    the others wait for. It sends this process SIGTERM when the launcher dies. On rank 0 it writes ``heartbeat.json``.

    Every few seconds each rank posts its place to a store, which adds nothing to the steps. The time that torch.compile
    takes (tracing, compiling, recording CUDA graphs) does not count, nor does the wait for a rank that compiles.
    """

    def __init__(self, ranks: Ranks, timeout: float, run: Path):
        self._ranks, self._timeout, self._run = ranks, timeout, run
        self._interval = min(timeout / 4, 10.0)
        self._step, self._place, self._moves, self._timed = 0, "preparing", 0, False
        self._moved = time.monotonic()
        self._compiling = False
        self._beats = 0
        self._stop = threading.Event()
        self._store = _store(ranks)
        self._thread = threading.Thread(target=self._run_thread, name="mixreorg-watch", daemon=True)

    def __enter__(self) -> Watch:
        callback_handler.register_start_callback(self._start_compiling)
        callback_handler.register_end_callback(self._stop_compiling)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        callback_handler.remove_start_callback(self._start_compiling)
        callback_handler.remove_end_callback(self._stop_compiling)
        self._stop.set()
        self._thread.join(self._interval)
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            self._place = f"failed ({kind.__name__})"
        self._beat()  # so that the run does not look hung

    def at(self, step: int, place: str, *, timed: bool = True) -> None:
        """Note that this rank is at `place` of a step; `timed` False: the timeout does not apply there."""
        self._step, self._place, self._timed = step, place, timed
        self._moves += 1
        self._moved = time.monotonic()

    def _start_compiling(self, _: object) -> None:
        self._compiling = True

    def _stop_compiling(self, _: object) -> None:
        self._compiling = False
        self._moved = time.monotonic()

    @property
    def _is_timed(self) -> bool:
        return self._timed and not self._compiling

    def _run_thread(self) -> None:
        ends = select.poll()
        for launcher in launchers():
            with contextlib.suppress(OSError):  # the kernel has no pidfd_open, or the launcher is gone
                ends.register(os.pidfd_open(launcher), select.POLLIN)
        orphaned = None
        due = time.monotonic()
        while not self._stop.is_set():
            if orphaned is None and ends.poll(0):
                orphaned = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
            if orphaned is not None and time.monotonic() - orphaned > self._timeout:
                self._end("the launcher is gone and the ranks did not reach the end of their step")
            if time.monotonic() >= due:
                due += self._interval
                self._beat()
                if self._is_timed and time.monotonic() - self._moved > self._timeout:
                    self._give_up()
            self._stop.wait(min(1.0, self._interval))

    def _beat(self) -> None:
        self._beats += 1
        place = "compiling" if self._compiling else self._place
        mine = {"beat": self._beats, "moves": self._moves, "step": self._step, "place": place}
        post = {**mine, "timed": self._is_timed, "host": socket.gethostname()}
        with contextlib.suppress(RuntimeError):  # rank 0, which holds the store, has finished
            self._store.set(str(self._ranks.rank), json.dumps(post))
        if self._ranks.is_main and self._run.is_dir():
            beat = {"time": time.time(), "pid": os.getpid(), **mine, "finished": self._place == FINISHED}
            with contextlib.suppress(OSError):
                write_json(self._run / "heartbeat.json", beat)

    def _give_up(self) -> None:
        before, moves = self._posts(), self._moves
        for _ in range(2):
            self._stop.wait(self._interval)
            self._beat()
        now = self._posts()
        if self._stop.is_set() or self._moves != moves:
            return  # there was progress after all
        speaker = self._ranks.rank
        if min(len(before), len(now)) < self._ranks.size:
            who = "rank 0, which holds the ranks' store, does not answer"
        else:
            silent = [rank for rank in now if now[rank]["beat"] == before[rank]["beat"]]
            behind = min(post["moves"] for post in now.values())
            stopped = silent or [rank for rank in now if now[rank]["moves"] == behind]
            if not silent and not all(now[rank]["timed"] for rank in stopped):
                self._moved = time.monotonic()  # the timeout does not apply to the rank that the others wait for
                return
            state = "does not answer" if silent else "hangs"
            who = "; ".join(
                f"rank {rank} on {now[rank]['host']} {state} (step {now[rank]['step']}, {now[rank]['place']})"
                for rank in stopped
            )
            if len(stopped) == self._ranks.size > 1:
                who = f"all {self._ranks.size} ranks are at the same place ({self._place})"
            speaker = min(set(now) - set(silent), default=speaker)
        if self._ranks.rank != speaker:
            time.sleep(self._interval)  # let the line be printed before the launcher ends everyone
        self._end(f"no progress for {self._timeout:g} s (train.timeout): {who}", speaks=self._ranks.rank == speaker)

    def _posts(self) -> dict[int, dict[str, Any]]:
        """The last post of each rank; some are missing if rank 0 does not answer."""
        posts: dict[int, dict[str, Any]] = {}

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                for rank in range(self._ranks.size):
                    posts[rank] = json.loads(self._store.get(str(rank)))

        reader = threading.Thread(target=read, daemon=True)  # it waits forever if rank 0 is stopped
        reader.start()
        reader.join(self._interval)
        return dict(posts)

    def _end(self, reason: str, *, speaks: bool = True) -> None:
        if speaks:
            with contextlib.suppress(OSError):
                print(f"error: step {self._step}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _store(ranks: Ranks) -> Store:
    """A key-value store of the ranks, held by rank 0; call on every rank."""
    if ranks.size == 1:
        return HashStore()
    host = os.environ["MASTER_ADDR"]
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if ranks.is_main else None
    port = on_main(lambda: store.port if store else 0)
    return store or TCPStore(host, port, is_master=False)


def launchers() -> list[int]:
    """Process ids of the launchers above this process (``deepspeed`` starts ranks through a second launcher)."""
    found, pid = [], os.getppid()
    with contextlib.suppress(OSError, ValueError):  # a process has ended
        while pid > 1:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:6]
            if not any(os.path.basename(argument.decode(errors="replace")) in _LAUNCHERS for argument in arguments):
                break
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            found.append(pid)
            pid = parent
    return found
