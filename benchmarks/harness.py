"""One way of measuring for every benchmark: what runs, how it is timed, what a row of the results says.

A benchmark file lists :class:`Case` objects and has one test::

    @matrix(CASES)
    def test_patch_mix(measure, case, implementation, mode, graph):
        measure(case, implementation, mode, graph)

Times are wall-clock between device synchronisations. A round is many calls that rotate through several input sets, so
that no call finds its inputs in a cache. Each row is also compared with this device's own copy bandwidth and matmul
rate, measured in the same session. Rows under CUDA graphs leave out the host's launch cost; the others include it.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mixreorg_fast import ops
from mixreorg_fast.ledger import commit, file_stem, now, versions, write_rows
from mixreorg_fast.ops.dispatch import TRITON_INSTALLED

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # CPUs compute in fp32
CPU_BF16 = not ON_GPU and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # CPUs that have it get rows of their own
RESULTS = Path(__file__).parent / "results"

MODES = ("fwd", "bwd", "fwd+bwd")  # of an op; a "step" is one call that does all there is to do

INPUT_SETS = 4 if ON_GPU else 2
GRAPH_CALLS = 3 * INPUT_SETS  # captured together, so that the gap between two replays is spread over them
ROUNDS = 25 if ON_GPU else 5
ROUND_SECONDS = 0.01 if ON_GPU else 0.005  # at least: a round is as many calls as that takes
ROW_SECONDS = 5.0 if ON_GPU else 1.0  # at most, unless three rounds take longer

Mode = Literal["fwd", "bwd", "fwd+bwd", "step"]


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do: bytes read once and written once, operations."""

    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape, in every implementation.

    Args:
        suite: part of the results. Only in suite "op" is "compiled" added unlisted, and rows under CUDA graphs.
        op: its public name. shape: as printed in the tables, "1024x196x384 K=4".
        batch: images, for images per second.
        inputs: generator -> one set of inputs, random, on DEVICE; those that require grad are differentiated.
        implementations: name -> function of one input set. "eager" is what people write without this package (no
            emulated Philox, no re-association that the op itself brings); "compiled" the same function, compiled here
            when not given; "triton" is the op with impl="triton"; others are further baselines.
        work: mode -> :class:`Work`. modes: those that exist for this op.
        bandwidth: the ceiling of ops bound by memory: "copy", or "write" for those that hardly read.
        at: for cases that show how the cost grows: the axis that grows, and its value.
    """

    op: str
    shape: str
    batch: int
    inputs: Callable[[torch.Generator], Sequence[Any]]
    implementations: Mapping[str, Callable[..., Any]]
    work: Mapping[str, Work]
    modes: Sequence[Mode] = MODES
    dtype: torch.dtype = DTYPE
    bandwidth: Literal["copy", "write"] = "copy"
    suite: Literal["op", "step", "loader", "inference"] = "op"
    at: tuple[str, float] | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}".replace(" ", "-")


def matrix(cases: Sequence[Case]) -> Callable:
    """Parametrise a test over (case, implementation, mode, graph); Triton and CUDA graphs only on a GPU."""
    combinations = [
        pytest.param(case, name, mode, graph, id=f"{case}-{name}-{mode}{'-graph' if graph else ''}")
        for case in cases
        for name in dict.fromkeys((*(("eager", "compiled") if case.suite == "op" else ()), *case.implementations))
        if name != "triton" or (ON_GPU and TRITON_INSTALLED)
        for mode in case.modes
        for graph in ((False, True) if ON_GPU and case.suite == "op" else (False,))
    ]

    def decorate(test: Callable) -> Callable:
        test = pytest.mark.parametrize(("case", "implementation", "mode", "graph"), combinations)(test)
        return pytest.mark.benchmark(timer=synchronized_time)(test)

    return decorate


def synchronized_time() -> float:
    """The clock after all device work is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def run_case(benchmark: Any, case: Case, implementation: str, mode: Mode, graph: bool) -> dict[str, Any] | None:
    """Measure one combination with pytest-benchmark's `benchmark`; the row of the results.

    None with ``--benchmark-disable``, which only runs everything once.
    """
    _forget_other_graphs(case, implementation)
    function = _implementation(case, implementation)
    generator = torch.Generator(DEVICE).manual_seed(0)
    stream = torch.cuda.Stream() if ON_GPU else None
    # Backward runs on the stream its forward ran on, and a capture needs a stream of its own: use one for all.
    with torch.cuda.stream(stream):
        sets = [case.inputs(generator) for _ in range(INPUT_SETS)]
        peak_mb = _peak_mb(function, sets[0], mode)
        calls = [_call(function, inputs, mode) for inputs in sets]
        for call in calls:
            call()
        step = _captured(calls, stream) if graph else _rotating(calls)
        unit = GRAPH_CALLS if graph else INPUT_SETS
        if mode == "step":  # long enough to be a round by itself
            rounds, iterations = ROUNDS, 1
        else:
            for _ in range(unit):
                step()
            start = synchronized_time()
            for _ in range(unit):
                step()
            seconds = (synchronized_time() - start) / unit
            iterations = unit * max(1, round(ROUND_SECONDS / seconds / unit))
            rounds = min(ROUNDS, max(3, round(ROW_SECONDS / (seconds * iterations))))
        benchmark.pedantic(step, rounds=rounds, iterations=iterations)
    if benchmark.stats is None:
        return None
    times = sorted(1e3 * seconds for seconds in benchmark.stats.stats.data)
    median, p20, p80 = (_quantile(times, q) for q in (0.5, 0.2, 0.8))
    work = case.work[mode]
    row = {
        "suite": case.suite,
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": mode,
        "implementation": implementation,
        "graph": graph,
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "peak_mb": peak_mb,
        "images_per_s": case.batch / median * 1e3,
        "gb_per_s": work.bytes / median * 1e-6,
        "tflop_per_s": work.flops / median * 1e-9,
        "limit_fraction": _floor_ms(case, work) / median,
        "date": now(),
        "commit": commit(),
    }
    if case.at is not None:
        row["axis"], row["at"] = case.at
    row = {key: rounded(value) for key, value in row.items()}
    benchmark.group = f"{case} {mode}{' graph' if graph else ''}"
    benchmark.extra_info.update(row)
    return row


@lru_cache(maxsize=1)
def _forget_other_graphs(case: Case, implementation: str) -> None:
    """Drop the graphs of the case before: its shapes would make this case's symbolic, and torch.compile limits their
    number."""
    torch._dynamo.reset()


@cache
def _compiled(function: Callable) -> Callable:
    torch._functorch.config.donated_buffer = False  # backward alone is timed on a graph that is kept
    return torch.compile(function, dynamic=False)


def _implementation(case: Case, name: str) -> Callable:
    if name == "compiled" and name not in case.implementations:
        return _compiled(case.implementations["eager"])
    return case.implementations[name]


def _call(function: Callable, inputs: Sequence[Any], mode: Mode) -> Callable[[], Any]:
    """One call of `mode` on one input set."""
    if mode in ("fwd", "step"):
        return lambda: function(*inputs)
    wanted = _differentiated(inputs)
    outputs = _forward(function, inputs)
    grads = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outputs]
    if mode == "bwd":
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_forward(function, inputs), wanted, grads)


def _forward(function: Callable, inputs: Sequence[Any]) -> list[Tensor]:
    """The outputs that can be differentiated."""
    out = function(*inputs)
    return [x for x in ([out] if isinstance(out, Tensor) else out) if x.requires_grad]


def _differentiated(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def _rotating(calls: Sequence[Callable]) -> Callable[[], None]:
    turn = itertools.cycle(calls)

    def step() -> None:
        next(turn)()

    return step


def _captured(calls: Sequence[Callable], stream: torch.cuda.Stream) -> Callable[[], None]:
    """A CUDA graph of GRAPH_CALLS calls, replayed at every GRAPH_CALLS-th step: one step is one call on average."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in itertools.islice(itertools.cycle(calls), GRAPH_CALLS):
                call()
    except RuntimeError as error:
        pytest.skip(f"cannot be captured: {str(error).splitlines()[0]}")
    turn = itertools.cycle(range(GRAPH_CALLS))

    def step() -> None:
        if next(turn) == 0:
            graph.replay()

    return step


def _peak_mb(function: Callable, inputs: Sequence[Any], mode: Mode) -> float | None:
    """Peak memory of one call beyond its inputs; with "bwd" what forward saved counts too. None on a CPU."""
    _call(function, inputs, mode)()  # compiles and warms up
    if not ON_GPU:
        return None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if mode in ("fwd", "step"):
        outputs = function(*inputs)
    else:
        outputs = _forward(function, inputs)
        grads = [torch.ones_like(out) for out in outputs]
        if mode == "bwd":
            torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(outputs, _differentiated(inputs), grads)
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    return peak / 2**20


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[round(q * (len(ordered) - 1))]


def _floor_ms(case: Case, work: Work) -> float:
    """The time that this device needs at least: moving the bytes, or computing."""
    limits = ceilings()
    matrix_rate = limits["matmul_bf16_tflop_per_s" if case.dtype != torch.float32 else "matmul_fp32_tflop_per_s"]
    return max(work.bytes / limits[f"{case.bandwidth}_gb_per_s"] * 1e-6, work.flops / matrix_rate * 1e-9)


@cache
def ceilings() -> dict[str, float]:
    """What this device reaches in a copy (bytes read plus written), a fill and square matmuls."""
    elements = 2**29 if ON_GPU else 2**24
    source = torch.randn(elements, device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)
    size = 4096 * (2 if ON_GPU else 1) // (1 if ON_GPU else 4)
    limits = {
        "copy_gb_per_s": 2 * source.nbytes / _median_seconds(lambda: target.copy_(source)) * 1e-9,
        "write_gb_per_s": target.nbytes / _median_seconds(lambda: target.fill_(1.5)) * 1e-9,
    }
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
        seconds = _median_seconds(lambda a=a, b=b: a @ b)
        if not ON_GPU and dtype == torch.float32:  # the better of a CPU's two libraries
            seconds = min(seconds, _median_seconds(lambda a=a, b=b: ops.linear(a, b, impl="onednn")))
        limits[f"matmul_{name}_tflop_per_s"] = 2 * size**3 / seconds * 1e-12
    return {key: rounded(value) for key, value in limits.items()}


def _median_seconds(call: Callable[[], Any], rounds: int = 7, calls: int = 5) -> float:
    """Median of rounds of a few calls."""
    call()
    seconds = []
    for _ in range(rounds):
        start = synchronized_time()
        for _ in range(calls):
            call()
        seconds.append((synchronized_time() - start) / calls)
    return statistics.median(seconds)


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def header() -> dict[str, Any]:
    """The header of this device's results file."""
    return {**versions(" ".join(["pytest", *sys.argv[1:]])), **ceilings()}


def write_results(rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Put `rows` into ``<device>.json``. They replace the rows of the same suites and ops; other rows stay."""
    path = folder / f"{file_stem(header['device'])}.json"
    measured = {(row["suite"], row["op"]) for row in rows}
    write_rows(path, header, rows, keep=lambda row: (row["suite"], row.get("op")) not in measured)
    return path
