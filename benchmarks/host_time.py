"""What the host spends on an op, forward and backward, without a GPU: ``python -m benchmarks.host_time``.

Tensors are small and lie on the CPU. Launches stop before the driver: Triton binds and specialises the arguments and
looks up the compiled kernel, but launches nothing. So a launch lacks only the driver's own call (a few microseconds).
The eager lines lack nothing, and their times include computing on small tensors. A GPU adds the same time to every
launch; eager lines have more launches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from mixreorg_fast import ops
from mixreorg_fast.kernels import offline, variants
from mixreorg_fast.ops.patch_mixing import patch_blend_reference, patch_mix_reference
from mixreorg_fast.ops.token_mixing import blend_tokens_reference, mix_tokens_reference, restore_tokens_reference

from . import test_contrastive_loss, test_grouping_attention, test_mixed_segmentation_loss
from .test_train_step import random_plan

BATCH, PATCHES, GROUPS, SEGMENTS, WIDTH, GROUP_SIZE = 4, 16, 16, 4, 16, 4
CALLS, ROUNDS = 50, 20


@contextlib.contextmanager
def launches_stubbed(architecture: int = 90) -> Iterator[None]:
    """Within it kernels take tensors of the CPU, as on sm_`architecture`, and leave their outputs as they are."""
    run = JITFunction.run

    def bound(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, warmup=True, **kwargs)

    with offline.compiling(architecture, bound), mock.patch.object(variants, "launches_on", lambda device: True):
        yield


def cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By op: a call of its kernel and a call of its eager lines."""
    plan = ops.MixPlan.sample(BATCH, PATCHES, GROUP_SIZE, seed=1)
    seed = torch.tensor(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    x, y, one, two = (leaf(BATCH * n, PATCHES + g, WIDTH) for n, g in ((1, 0), (1, 0), (1, GROUPS), (2, GROUPS)))
    q, k, v = leaf(BATCH, GROUPS, WIDTH), leaf(BATCH, PATCHES, WIDTH), leaf(BATCH, PATCHES, WIDTH)
    first = torch.rand(BATCH, GROUPS, PATCHES).softmax(1).requires_grad_()
    second = torch.rand(BATCH, SEGMENTS, GROUPS).softmax(1).requires_grad_()
    segments, texts, image = leaf(BATCH, SEGMENTS, WIDTH), leaf(BATCH, WIDTH), leaf(BATCH, WIDTH)
    scale = torch.tensor([30.0], requires_grad=True)
    rates = [i / 110 for i in range(12)]
    maps, scores = first.detach().unflatten(2, (4, 4))[:, :SEGMENTS], torch.randn(BATCH, SEGMENTS, 8)
    impl = {"impl": "triton"}
    return {
        "MixPlan.sample": (
            lambda: ops.MixPlan.sample(BATCH, PATCHES, GROUP_SIZE, seed=seed, **impl).source,
            lambda: random_plan(BATCH, PATCHES, GROUP_SIZE, device=seed.device).source,
        ),
        "patch_mix": (lambda: ops.patch_mix(x, plan, **impl), lambda: patch_mix_reference(x, plan.source)),
        "patch_blend": (
            lambda: ops.patch_blend(x, y, plan, 0.5, **impl),
            lambda: patch_blend_reference(x, y, plan.source, 0.5),
        ),
        "mix_tokens": (
            lambda: ops.mix_tokens(one, plan, **impl),
            lambda: mix_tokens_reference(one, plan.source, GROUP_SIZE),
        ),
        "blend_tokens": (
            lambda: ops.blend_tokens(two, plan, 0.5, **impl),
            lambda: blend_tokens_reference(two, plan.source, 0.5),
        ),
        "restore_tokens": (
            lambda: ops.restore_tokens(two, plan, **impl),
            lambda: restore_tokens_reference(two, plan.inverse, GROUP_SIZE),
        ),
        "stochastic_depth": (
            lambda: ops.stochastic_depth(seed, rates, BATCH, branches=3, **impl),
            lambda: (torch.rand(2, len(rates), 3 * BATCH) >= 0.1).float() / 0.9,
        ),
        "grouping_attention": (
            lambda: ops.grouping_attention(q, k, v, seed=seed, return_assignment="used", **impl),
            lambda: test_grouping_attention.eager(q, k, v, seed, "used"),
        ),
        "mixed_segmentation_loss": (
            lambda: ops.mixed_segmentation_loss(first, second, segments, texts, plan, scale, **impl),
            lambda: test_mixed_segmentation_loss.eager(first, second, segments, texts, plan, scale),
        ),
        "contrastive_loss": (
            lambda: ops.contrastive_loss(image, texts, scale, **impl),
            lambda: test_contrastive_loss.eager(image, texts, scale),
        ),
        "decode_segments": (
            lambda: ops.decode_segments(maps, scores, (8, 8), **impl),
            lambda: F.interpolate(maps, (8, 8), mode="bilinear").argmax(1),
        ),
    }


def microseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Of one call and of its backward: the least of several rounds, in this thread's CPU time."""

    def outputs() -> list[Tensor]:
        out = call()
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]

    gradients = [torch.ones_like(x) for x in outputs()]
    if gradients:
        torch.autograd.backward(outputs(), gradients)  # gradients exist, kernels are compiled
    forward = backward = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        outs = [outputs() for _ in range(CALLS)]
        middle = time.thread_time()
        if gradients:
            for out in outs:
                torch.autograd.backward(out, gradients)
        forward, backward = min(forward, middle - start), min(backward, time.thread_time() - middle)
    return forward / CALLS * 1e6, backward / CALLS * 1e6


def rows(only: str = "") -> list[dict[str, Any]]:
    """Per op the host's microseconds, forward and backward, of the kernel and of the eager lines."""
    torch.set_num_threads(1)
    made = []
    for op, (ours, eager) in cases().items():
        if only in op:
            with launches_stubbed():
                forward, backward = microseconds(ours)
            of_eager = microseconds(eager)
            made.append(
                {
                    "op": op,
                    "ours_forward_us": round(forward, 1),
                    "ours_backward_us": round(backward, 1),
                    "eager_forward_us": round(of_eager[0], 1),
                    "eager_backward_us": round(of_eager[1], 1),
                }
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name holds it")
    for row in rows(parser.parse_args().only):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
