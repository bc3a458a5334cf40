"""Least times of the ops on a GPU, counted without one: ``python -m benchmarks.counted STATE``.

Each op runs forward and backward on meta tensors of the model's shapes. Its kernels are compiled for an H100, and their
instructions are counted. Of PyTorch's own operations, bytes and matmuls are counted. From these counts follows the
least time that an H100 needs: the longest of memory, instruction issue and matmuls, kernel by kernel. STATE is a name
for what is counted, such as "before" or "after"; the rows of other states stay in benchmarks/results/counted.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mixreorg_fast import ledger, ops
from mixreorg_fast.kernels.offline import Launch, offline
from mixreorg_fast.ops import registration, token_mixing
from mixreorg_fast.ops.decode_segments import decode_segments_reference
from mixreorg_fast.ops.token_mixing import blend_tokens_reference, mix_tokens_reference, restore_tokens_reference

from . import harness, test_contrastive_loss, test_grouping_attention, test_mixed_segmentation_loss

RESULTS = harness.RESULTS / "counted.json"
ARCHITECTURE = 90
# NVIDIA H100 SXM, from its data sheet: dense products, memory, and a warp instruction per scheduler and clock.
BYTES_PER_S, CLOCK, SCHEDULERS = 3.35e12, 1.755e9, 132 * 4
FLOP_PER_S = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
COUNTED_FOR = {"gpu": "NVIDIA H100 SXM", "gb_per_s": BYTES_PER_S * 1e-9, "ghz": CLOCK * 1e-9, "multiprocessors": 132}
IMAGES, PATCHES, GROUPS, SEGMENTS, CHANNELS, WIDTH, K = 1024, 196, 64, 8, 384, 256, 4


@dataclass(frozen=True)
class Op:
    """An op at one of the model's shapes, ours and plain PyTorch, with the target."""

    name: str
    shape: str
    inputs: Sequence[Tensor]  # that are differentiated
    ours: Callable[[], Any]
    eager: Callable[[], Any]
    target: str  # on an H100 or H200, in bf16, forward and backward
    flops: float = 0.0  # of our kernels' matmuls


def operations() -> Iterator[Op]:
    seed, plan = _seed(), _plan(IMAGES)
    x, mixed = _tokens(), _tokens()
    shape = f"{IMAGES}x{PATCHES}x{CHANNELS} K={K}"
    yield Op(
        "patch_mix",
        shape,
        [x],
        lambda: ops.patch_mix(x, plan, impl="triton"),
        lambda: ops.patch_mixing.patch_mix_reference(x, plan.source),
        "85 % of copy bandwidth",
    )
    yield Op(
        "patch_blend",
        shape,
        [mixed, x],
        lambda: ops.patch_blend(mixed, x, plan, 0.5, impl="triton"),
        lambda: ops.patch_mixing.patch_blend_reference(mixed, x, plan.source, 0.5),
        "85 % of copy bandwidth",
    )
    yield from _whole_tokens(plan)
    for groups, patches in ((GROUPS, PATCHES), (SEGMENTS, GROUPS)):
        q = _random(IMAGES, groups, CHANNELS)
        kv = torch.empty(IMAGES, patches, 2 * CHANNELS, dtype=torch.bfloat16, device="meta")
        k, v = (x.requires_grad_() for x in kv.chunk(2, dim=2))  # one projection, as in the model
        for returned in ("none", "used"):
            yield Op(
                "grouping_attention",
                f"{IMAGES}x{groups}x{patches}x{CHANNELS}" + " with assignment" * (returned == "used"),
                [q, k, v],
                lambda q=q, k=k, v=v, returned=returned: ops.grouping_attention(
                    q, k, v, seed=seed, return_assignment=returned, impl="triton"
                ),
                lambda q=q, k=k, v=v, returned=returned: test_grouping_attention.eager(q, k, v, seed, returned),
                "3× eager" if groups == GROUPS else "",
                flops=8 * 2 * IMAGES * groups * patches * CHANNELS,
            )
    first = _random(IMAGES, GROUPS, PATCHES, dtype=torch.float32)
    second = _random(IMAGES, SEGMENTS, GROUPS, dtype=torch.float32)
    segments, texts = _random(IMAGES, SEGMENTS, WIDTH, dtype=torch.float32), _random(IMAGES, WIDTH, dtype=torch.float32)
    scale = torch.empty(1, device="meta", requires_grad=True)
    yield Op(
        "mixed_segmentation_loss",
        f"{IMAGES}x{GROUPS}x{PATCHES} G2={SEGMENTS} K={K}",
        [first, second, segments, texts, scale],
        lambda: ops.mixed_segmentation_loss(first, second, segments, texts, plan, scale, impl="triton"),
        lambda: test_mixed_segmentation_loss.eager(first, second, segments, texts, plan, scale),
        "5× eager",
    )
    for rows, target in ((32768, "1.5× eager"), (4096, "")):
        image, text = _random(rows, WIDTH), _random(rows, WIDTH)
        yield Op(
            "contrastive_loss",
            f"{rows}x{WIDTH}",
            [image, text, scale],
            lambda image=image, text=text: ops.contrastive_loss(image, text, scale, impl="triton"),
            lambda image=image, text=text: test_contrastive_loss.eager(image, text, scale),
            target,
            flops=2 * 2 * rows * rows * WIDTH,
        )
    maps, scores = (torch.empty(64, SEGMENTS, *size, device="meta") for size in ((28, 37), (150,)))
    yield Op(
        "decode_segments",
        "64x8x28x37 to 512x683 T=150",
        [],
        lambda: ops.decode_segments(maps, scores, (512, 683), impl="triton"),
        lambda: decode_segments_reference(maps, scores, (512, 683)),
        "3× an eager look-up",
    )


def _whole_tokens(plan: ops.MixPlan) -> Iterator[Op]:
    """In one launch each; and by the ops on patches, with slices and concatenations around them."""
    one, two = (_random(branches * IMAGES, PATCHES + GROUPS, CHANNELS) for branches in (1, 2))

    def by_op(op: Callable[..., Tensor], reference: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`reference`, whose patches `op` moves."""

        def call() -> Tensor:
            moved = mock.patch.object(token_mixing, "patch_mix_reference", lambda x, *_: op(x, plan, impl="triton"))
            with moved:
                return reference()

        return call

    def mix() -> Tensor:
        return mix_tokens_reference(one, plan.source, K)

    def restore() -> Tensor:
        return restore_tokens_reference(two, plan.inverse, K)

    def blend() -> Tensor:
        original, mixed = two.chunk(2)
        blended = ops.patch_blend(mixed[:, :PATCHES], original[:, :PATCHES], plan, 0.5, impl="triton")
        return torch.cat([original, torch.cat([blended, mixed[:, PATCHES:]], dim=1)])

    for name, x, whole, by_patches, eager in (
        (
            "mix_tokens",
            one,
            lambda: ops.mix_tokens(one, plan, impl="triton"),
            by_op(ops.patch_mix, mix),
            mix,
        ),
        (
            "blend_tokens",
            two,
            lambda: ops.blend_tokens(two, plan, 0.5, impl="triton"),
            blend,
            lambda: blend_tokens_reference(two, plan.source, 0.5),
        ),
        (
            "restore_tokens",
            two,
            lambda: ops.restore_tokens(two, plan, impl="triton"),
            by_op(ops.patch_restore, restore),
            restore,
        ),
    ):
        shape = f"{IMAGES}x{PATCHES}+{GROUPS}x{CHANNELS} K={K}"
        yield Op(name, shape, [x], whole, eager, "85 % of copy bandwidth")
        yield Op(f"{name}, by ops on patches", shape, [x], by_patches, eager, "")


@dataclass(frozen=True)
class Work:
    """What one kernel or operation does at least."""

    name: str
    bytes: float
    flops: float = 0.0
    rate: float = FLOP_PER_S[torch.float32]
    instructions: float = 0.0  # of all warps

    def seconds(self) -> dict[str, float]:
        return {
            "memory": self.bytes / BYTES_PER_S,
            "issue": self.instructions / (SCHEDULERS * CLOCK),
            "products": self.flops / self.rate,
        }


class Counter(TorchDispatchMode):
    """PyTorch's operations that launch a kernel: those that make a tensor or change one."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        returned = function._schema.returns
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in returned)
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        if views or name.startswith(("empty", "new_empty", "detach", "_local_scalar", "sym_")) or name == "lift_fresh":
            return out
        tensors = {id(x): x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        count = flop_registry.get(function.overloadpacket)
        flops = count(*(x for x in args if isinstance(x, Tensor)), out_val=out) if count else 0  # of matmuls
        # A product of 16-bit tensors may write fp32.
        rate = max((FLOP_PER_S[x.dtype] for x in tensors.values() if x.dtype in FLOP_PER_S), default=1.0)
        self.work.append(Work(name, size, flops, rate))
        return out


def count(call: Callable[[], Any], inputs: Sequence[Tensor], flops: float = 0.0) -> list[Work]:
    """The kernels and operations of `call` and of its backward pass, on meta tensors."""
    untraced = mock.patch.object(registration, "traces", lambda tensor: False)  # although a dispatch mode is active
    with untraced, offline(ARCHITECTURE) as launches, Counter() as counter:
        out = call()
        outputs = [x for x in ([out] if isinstance(out, Tensor) else out) if x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs])
    kernels = [
        Work(launch.kernel, launch.bytes, flops / len(launches), FLOP_PER_S[torch.bfloat16], executed(launch))
        for launch in launches
    ]
    return kernels + counter.work


def executed(launch: Launch) -> float:
    """Instructions of all warps of a launch."""
    once = launch.instructions + sum(size * rounds(launch, number) for number, size in enumerate(launch.loops))
    return once * launch.num_warps * launch.programs


# By kernel, for each of its loops in order: the size that the loop covers, and its step.
LOOPS = {
    "grouping_forward": [("CHANNELS", "BLOCK_CHANNELS")],
    "grouping_backward": [("CHANNELS", "BLOCK_CHANNELS")],
    "aggregate": [("patches", "BLOCK_PATCHES")],
    "log_sum_exp": [("D", "BLOCK_D")],
    "weights": [("D", "BLOCK_D")],
    "merge": [("parts", "BLOCK_PARTS")],
    "segment_label": [("classes", "BLOCK_CLASSES")],
    "decode": [("GROUPS", None)],
    "append_branch_forward": [("group_size", None)],
    "append_branch_backward": [("group_size", None)],
    "blend_tokens": [("group_size", None)],
    "mixed_segmentation_scores": [("D", "BLOCK_D")],
    "mixed_segmentation_cosines": [("PARTS", "BLOCK_PARTS")],
    "mixed_segmentation_embeddings": [("ROWS", "BLOCK_ROWS")],
    "mixed_segmentation_forward": [("K", "COUNT")],
    "mixed_segmentation_backward": [("K", "COUNT")],
}


def rounds(launch: Launch, number: int) -> int:
    """How often loop `number` of a kernel runs."""
    sizes = launch.sizes
    steps = LOOPS[launch.kernel]
    size, step = steps[min(number, len(steps) - 1)]
    return math.ceil(sizes[size] / (sizes[step] if step else 1))


def of_ops() -> Iterator[dict[str, Any]]:
    """A row for ours and one for the eager lines of every op."""
    for op in operations():
        for name, call, flops in (("ours", op.ours, op.flops), ("eager", op.eager, 0.0)):
            work = count(call, op.inputs, flops)
            seconds = [part.seconds() for part in work]
            bounds: dict[str, float] = {}
            for part in seconds:
                bound = max(part, key=part.get)
                bounds[bound] = bounds.get(bound, 0.0) + part[bound]
            yield {
                "part": "ops",
                "op": op.name,
                "shape": op.shape,
                "implementation": name,
                "launches": len(work),
                "mb": sum(part.bytes for part in work) * 1e-6,
                "warp_minstructions": sum(part.instructions for part in work) * 1e-6,
                "predicted_us": sum(bounds.values()) * 1e6,
                "bound": max(bounds, key=bounds.get),
                "target": op.target,
            }


def of_others(modules: Sequence[str] = ("host_time", "launches", "activations")) -> Iterator[dict[str, Any]]:
    """What the host spends on each op, the launches of a micro-step, the memory of an image's activations."""
    for module in modules:  # each in its own process: some run Triton's interpreter
        code = f"import json; from benchmarks.{module} import rows; print(json.dumps(rows()))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for row in json.loads(result.stdout.splitlines()[-1]):
            yield {**row, "part": module}


def _seed() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="meta")


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _tokens() -> Tensor:
    """Patch tokens as the model holds them: a view into tokens that end with the group tokens."""
    x = torch.empty(IMAGES, PATCHES + GROUPS, CHANNELS, dtype=torch.bfloat16, device="meta")
    return x[:, :PATCHES].requires_grad_()


def _plan(images: int) -> ops.MixPlan:
    source, inverse = torch.zeros(2, images, PATCHES, dtype=torch.int32, device="meta")
    return ops.MixPlan(source, inverse, K)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", help='a name for what is counted, such as "before" or "after"')
    state = parser.parse_args(argv).state
    stamp = {"state": state, "date": ledger.now(), "commit": ledger.commit()}
    rows: list[Mapping[str, Any]] = [
        {**{key: harness.rounded(value) for key, value in row.items()}, "suite": "counted", **stamp}
        for row in (*of_ops(), *of_others())
    ]
    header = {**ledger.versions(" ".join(["python -m benchmarks.counted", state])), "counted_for": COUNTED_FOR}
    ledger.write_rows(RESULTS, header, rows, keep=lambda row: row["state"] != state)


if __name__ == "__main__":
    main()
