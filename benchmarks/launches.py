"""What a training micro-step asks of a GPU, counted on a CPU: ``python -m benchmarks.launches``

Every operation of PyTorch outside torch.compile is a launch, and so is every Triton kernel; a compiled call is one or
more. The kernels run under Triton's interpreter, compiled parts as the operations that they were traced from. The
model has all blocks of the full one and is narrow: the number of launches does not depend on the sizes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from mixreorg_fast.config import parse_config
from mixreorg_fast.models import MixReorg, layers, text_encoder
from mixreorg_fast.models.image_encoder import ImageEncoder
from mixreorg_fast.ops import dispatch, registration

from .test_train_step import CAPTIONS, VOCABULARY, random_batch

NARROW = {
    "image_size": 32,
    "width": 24,
    "heads": 2,
    "groups": [8, 4],
    "embed_dim": 16,
    "projection_hidden": 32,
    "text": {"vocab_size": VOCABULARY, "width": 16, "heads": 2},
}
# What a region of the forward is called in the table; what is in none of these methods counts as "features".
REGIONS = {
    (MixReorg, "_plan"): "mixing plan",
    (MixReorg, "_drops"): "stochastic depth",
    (MixReorg, "_first_stage"): "stage 1",
    (ImageEncoder, "finish"): "stages 2 and 3",
    (MixReorg, "_texts"): "captions",
    (MixReorg, "losses"): "losses",
}
KINDS = ("eager", "compiled", "triton")
# Operations without a kernel that are no views by their schema.
_FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh")


def _is_launch(operation: torch._ops.OpOverload) -> bool:
    outputs = operation._schema.returns
    views = any(out.alias_info is not None and not out.alias_info.is_write for out in outputs)
    tensors = any("Tensor" in str(out.type) for out in outputs)
    return tensors and not views and not operation.name().startswith(_FREE)


class Launches(TorchDispatchMode):
    """Counts launches by region and kind while it is active; within :meth:`paused` and compiled parts it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.operations: Counter[tuple[str, str]] = Counter()  # eager ones, by region and name
        self.region = "features"
        self._pauses = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not self._pauses and _is_launch(operation):
            self.add("eager")
            self.operations[self.region, operation.name()] += 1
        return operation(*args, **(kwargs or {}))

    def add(self, kind: str) -> None:
        if not self._pauses:
            self.counts[self.region][kind] += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    @contextlib.contextmanager
    def within(self, region: str) -> Iterator[None]:
        before, self.region = self.region, region
        try:
            yield
        finally:
            self.region = before

    def counting(self, kind: str, function: Callable) -> Callable:
        """`function` as one launch of `kind`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.add(kind)
            with self.paused():
                return function(*args, **kwargs)

        return counted

    def backend(self) -> Callable:
        """A backend of torch.compile that compiles nothing."""

        def compiler(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable:
            return make_boxed_func(self.counting("compiled", graph.forward))

        return aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)


@contextlib.contextmanager
def _as_on_a_gpu(launches: Launches) -> Iterator[None]:
    """On CPU tensors: kernels wherever a GPU would take them, torch.compile, host work not counted."""
    from triton.runtime.interpreter import GridExecutor

    def in_region(module: type, name: str, region: str) -> Callable:
        method = getattr(module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with launches.within(region):
                return method(*args, **kwargs)

        return run

    def packing(*args: Any, **kwargs: Any) -> Any:
        with launches.paused():  # on the host, then one copy
            made = of(*args, **kwargs)
        launches.add("eager")
        return made

    of, execute = text_encoder.Packing.of, GridExecutor.__call__
    with contextlib.ExitStack() as stack:
        for (module, name), region in REGIONS.items():
            stack.enter_context(mock.patch.object(module, name, in_region(module, name, region)))
        stack.enter_context(mock.patch.object(text_encoder.Packing, "of", packing))
        stack.enter_context(mock.patch.object(dispatch, "passed_over", lambda op, inputs: []))
        # The counting modes must not send the ops to their custom ops, see registration.traces.
        traces = mock.patch.object(registration, "traces", lambda tensor: torch.compiler.is_compiling())
        stack.enter_context(traces)
        compiling = functools.partial(torch.compile, backend=launches.backend())
        stack.enter_context(mock.patch.object(torch, "compile", compiling))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launches.counting("triton", execute)))
        yield


def micro_step(method: str = "mixreorg", *, compiled: bool = True, **model: Any) -> Launches:
    """The launches of one forward and backward in bf16, of `method`, after a first one that compiled the parts;
    `model`: changes of the configuration's."""
    train = {"compile": compiled, "precision": "bf16"}
    config = parse_config({"model": {**NARROW, "method": method, **model}, "train": train})
    torch._dynamo.reset()
    layers.compiled_call.cache_clear()
    launches = Launches()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = MixReorg(config)
    with _as_on_a_gpu(launches):
        for _ in range(2):
            launches.counts.clear()
            launches.operations.clear()
            batch = random_batch(config, 8, CAPTIONS, generator)
            model.zero_grad(set_to_none=True)
            with launches:
                loss = model(batch)["loss"]
                with launches.within("backward"):
                    loss.backward()
    torch._dynamo.reset()
    layers.compiled_call.cache_clear()
    return launches


def rows(method: str = "mixreorg", *, compiled: bool = True) -> list[dict[str, Any]]:
    """One for each region and one for all: ``eager`` operations, ``compiled`` calls, ``triton`` kernels."""
    counts: Mapping[str, Counter[str]] = micro_step(method, compiled=compiled).counts
    whole = {**counts, "all": sum(counts.values(), Counter())}
    return [
        {
            "suite": "counted",
            "op": "launches of a micro-step",
            "what": f"{method}{'' if compiled else ', not compiled'}, {region}",
            **{kind: count[kind] for kind in KINDS},
        }
        for region, count in whole.items()
    ]


if __name__ == "__main__":
    for method in ("mixreorg", "groupvit"):
        for row in rows(method):
            print("{what:36} eager {eager:4} compiled {compiled:3} triton {triton:3}".format(**row))
