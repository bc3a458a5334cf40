"""Two errors of the compilers under Triton, recognised in the compiled code.

Both give wrong numbers without an error message, and neither shows under the interpreter. They were met on an H100 with
Triton 3.6.0; Triton 3.7.1 has them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_OPERAND = re.compile(r"tensor<([\dx]+)x\w+, #ttg\.dot_op<\{opIdx = ([01]), parent = (#mma\d*), kWidth = (\d+)\}>>")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?);")
_UNIFORM = re.compile(r"\bUR(\d+)(\.64)?\b")


def faults(ttgir: str, sass: str) -> tuple[str, ...]:
    """What is wrong with a kernel, from Triton's GPU IR and nvdisasm's listing; empty if nothing is."""
    return (*dict.fromkeys(wide_operands(ttgir)), *unwritten_registers(sass))


def wide_operands(ttgir: str) -> Iterator[str]:
    """Operands of ``mma`` whose rows are shorter than what the four threads of a row hold.

    A thread holds kWidth neighbours along the inner dimension K, so 4 * kWidth > K puts numbers in the wrong places.
    Triton widens kWidth where an operand is computed from loads of fewer bits.
    """
    mma = set(re.findall(r"(#mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 2", ttgir))
    for shape, index, parent, width in _OPERAND.findall(ttgir):
        inner = int(shape.split("x")[-1 - int(index)])
        if parent in mma and 4 * int(width) > inner:
            yield f"an operand {shape} of mma has kWidth {width}, which needs an inner dimension of {4 * int(width)}"


def unwritten_registers(sass: str) -> Iterator[str]:
    """Instructions that read a uniform register which no instruction before them has written.

    ptxas 12.8 does so for descriptors of ``wgmma`` in code without loops, whose second and later products then read
    from anywhere in shared memory.
    """
    written: set[int] = set()
    for line in sass.splitlines():
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        address, name, arguments = instruction.groups()
        operands = [operand.strip() for operand in arguments.split(",")]
        target = int(name.startswith("R2UR") and operands[0].startswith("P"))  # behind a predicate
        writes = re.fullmatch(r"UR(\d+)", operands[target])
        for place, operand in enumerate(operands):
            if place == target and writes:
                continue
            for number, pair in _UNIFORM.findall(operand):
                # Descriptors of both operands; elsewhere the first operand is in registers, or has a gdesc of its own.
                both = "gdesc" in operand and place == 1 and re.match(r"[A-Z]GMMA", name)
                two = pair or re.search(r"\bg?desc\[", operand) or re.match(r"U\w+\.64\b", name)
                size = 4 if both else 2 if two else 1
                if missing := [f"UR{n}" for n in range(int(number), int(number) + size) if n not in written]:
                    yield f"{address} {name} {arguments} reads {', '.join(missing)}, which nothing has written"
        if writes:
            size = 4 if ".128" in name else 2 if re.search(r"\.(64|WIDE)\b", name) else 1
            written |= set(range(int(writes[1]), int(writes[1]) + size))
