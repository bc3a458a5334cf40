"""Which implementation an op runs: capability as data, refusal with reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

Impl = Literal["auto", "triton", "torch"]


def choose(op: str, impl: str, reasons: Mapping[str, Callable[[], list[str]]], inputs: str = "") -> str:
    """The name of the implementation to run.

    `reasons` maps each implementation, fastest first, to a function that lists why it cannot run on these inputs.
    With "auto" the first one without reasons is taken; a forced one that has reasons raises.

    Raises:
        ValueError: `impl` is no known implementation.
        RuntimeError: the forced implementation (or, with "auto", every one) cannot run; every reason is listed.
    """
    if impl != "auto":
        if impl not in reasons:
            raise ValueError(f"{op}: impl must be 'auto' or one of {', '.join(map(repr, reasons))}, got {impl!r}")
        problems = reasons[impl]()
        if problems:
            raise RuntimeError(f"{op}: impl='{impl}' cannot run on {inputs or 'these inputs'}: {'; '.join(problems)}")
        return impl
    refusals = []
    for name, not_supported_reasons in reasons.items():
        problems = not_supported_reasons()
        if not problems:
            return name
        refusals.append(f"{name}: {'; '.join(problems)}")
    raise RuntimeError(f"{op}: no implementation can run on {inputs or 'these inputs'}: {' | '.join(refusals)}")
