"""Where the step's time goes, by families of operations, and what each would take at this device's limits.

Times come from PyTorch's profiler: of the device's kernels on a GPU, of the operations on a CPU. Bytes and operations
are counted on the same step without torch.compile: what each PyTorch operation reads and writes by itself, and the
products it computes. A compiled step fuses some of those bytes away.
"""

from __future__ import annotations

import re
from collections import defaultdict
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mixreorg_fast import ops

from . import harness, test_train_step
from .harness import DEVICE, ON_GPU
from .report import PROFILE

IMAGES = {"mixreorg": 512, "groupvit": 512} if ON_GPU else {"mixreorg": 4}
STEPS = 3

OTHER = "host and other"
# The first whose pattern is found in the name of a kernel or of a PyTorch operation.
FAMILIES = {
    "fused ops": r"mixreorg::|_(gather|blend|sample_plan|grouping|aggregate|mixed_segmentation|log_sum_exp|merge"
    r"|weights|segment_label|decode|append_branch|stochastic_depth)\w*_kernel",
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|cutlass|nvjet|cublas|wgmma|xmma|::(addmm|mm|bmm|baddbmm)$|_linear_pointwise|convolution",
    "normalisation": r"(layer|batch)_?norm",
    "optimizer": r"adam|multi_tensor|foreach",
    "collectives": r"nccl|c10d|gloo",
    "copies and indexing": r"::(_?copy|_to_copy|clone|cat|stack|index|gather|scatter|embedding|fill|zero|new_zeros)"
    r"|[mM]em(cpy|set)|CatArray|[iI]ndex|copy_kernel",
    "elementwise and sums": r"^aten::|triton_|elementwise|[rR]educe|softmax",
}


def family(name: str) -> str:
    return next((of for of, pattern in FAMILIES.items() if re.search(pattern, name)), OTHER)


class Counter(TorchDispatchMode):
    """Bytes and operations of all that runs under it, by family."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.is_view:
            return out
        of = family(function.name().split(".")[0])
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.bytes[of] += sum(x.nbytes for x in tensors)
        self.flops[of] += _flops(function, args, kwargs, out)
        return out


def _flops(function, args, kwargs, out) -> float:
    if "scaled_dot_product" in function.name():
        backward = "backward" in function.name()
        q, k = args[backward : backward + 2]
        # Two products forward; backward four, and the logits again.
        return (5 if backward else 2) * 2 * q.numel() * k.shape[-2]
    count = flop_registry.get(function._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


def count(config, batch) -> Counter:
    config = config.model_copy(deep=True)
    config.train.compile = False
    step = test_train_step.ours(config)
    with mock.patch.object(ops, "linear", F.linear), Counter() as counter:  # whose operations it knows
        step(batch)
    return counter


def times(step, batch, steps: int) -> tuple[dict[str, float], float]:
    """Milliseconds of a step by family, and of the whole by the clock."""
    for _ in range(2):
        step(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    start = harness.synchronized_time()
    for _ in range(steps):
        step(batch)
    wall = 1e3 * (harness.synchronized_time() - start) / steps
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step(batch)
        harness.synchronized_time()
    by_family: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if not ON_GPU:
            by_family[family(event.key)] += event.self_cpu_time_total / 1e3 / steps
        elif event.device_type == DeviceType.CUDA:
            by_family[family(event.key)] += event.self_device_time_total / 1e3 / steps
    return by_family, wall


def rows(method: str, name: str, images: int, steps: int = STEPS, **changes) -> list[dict]:
    config = test_train_step.configuration(method, harness.DTYPE, **changes)
    generator = torch.Generator(DEVICE).manual_seed(0)
    batch = test_train_step.random_batch(config, images, test_train_step.CAPTIONS, generator)
    by_family, wall = times(test_train_step.IMPLEMENTATIONS[name](config), batch, steps)
    counter = count(config, batch)
    limits = harness.ceilings()
    rate = limits["matmul_bf16_tflop_per_s" if torch.bfloat16 == harness.DTYPE else "matmul_fp32_tflop_per_s"]
    busy = sum(by_family.values())
    out = []
    for of in (*FAMILIES, OTHER):
        ms = by_family[of]
        if not ms:
            continue
        # Only of ours: what another implementation computes beyond it is not the step's work.
        flops, size = (counter.flops[of], counter.bytes[of]) if name == "ours" else (None, None)
        floor = None if flops is None else max(flops / rate * 1e-9, size / limits["copy_gb_per_s"] * 1e-6)
        out.append(
            {
                "suite": PROFILE,
                "op": f"{method} step, by family",
                "shape": f"{images}x3x{config.model.image_size}²",
                "dtype": str(harness.DTYPE).removeprefix("torch."),
                "implementation": name,
                "family": of,
                "ms": ms,
                "share": ms / busy,
                "gflop": None if flops is None else flops * 1e-9,
                "gbyte": None if size is None else size * 1e-9,
                "floor_ms": floor,
                "step_ms": wall,
            }
        )
    return out


@pytest.mark.parametrize("method", IMAGES)
def test_profile(record, method):
    found = record.once(lambda: [row for name in ("eager", "ours") for row in rows(method, name, IMAGES[method])])
    for row in found:
        record(**row)
