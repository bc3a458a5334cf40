"""Compile every checked-in kernel variant offline and report its resources: ``python -m mixreorg_fast.kernels.report``.

No GPU is needed, but a process of its own is: under ``TRITON_INTERPRET=1`` nothing compiles. Registers and spills
stand in no metadata; ptxas prints them (``-v``) while the kernel is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import __path__ as package_path
from .variants import ARCHITECTURES, KernelVariant


@dataclass(frozen=True)
class Resources:
    """What one variant takes on one architecture: per thread (registers, spills) and per block (shared memory)."""

    name: str
    architecture: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int


def variants(architecture: int) -> Iterator[KernelVariant]:
    """The variants of every kernel family."""
    for module in pkgutil.iter_modules(package_path):
        family = importlib.import_module(f"{__package__}.{module.name}")
        if hasattr(family, "signatures"):
            yield from family.signatures(architecture)


def resources(variant: KernelVariant, architecture: int) -> Resources:
    """Compile `variant` for sm_`architecture`."""
    types = {name: kind.removesuffix(":16") for name, kind in variant.signature.items()}
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=variant.constexprs,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in variant.signature.items()
            if kind.endswith(":16")
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    text = log.getvalue()
    return Resources(
        name=variant.name,
        architecture=architecture,
        num_warps=variant.num_warps,
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        spill_bytes=sum(int(number) for number in re.findall(r"(\d+) bytes spill", text)),
        shared_bytes=compiled.metadata.shared,
    )


def main() -> None:
    """Print one JSON object per variant and architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    for architecture in parser.parse_args().architectures:
        for variant in variants(architecture):
            print(json.dumps(asdict(resources(variant, architecture))), flush=True)


if __name__ == "__main__":
    main()
