"""Uniform registers that NVIDIA's machine code reads and that nothing has written: a fault of the assembler.

The threads of a warp share uniform registers, UR0 to UR62, which hold what is the same for all of them. From these,
tensor cores take the descriptors that say where in shared memory their factors are. ptxas 12.8, Triton 3.6's, may lose
the instructions that compute such a descriptor. The kernel then multiplies whatever is found where the register points,
which an earlier kernel decides: its results are wrong now and then, or it ends with an illegal address. ptxas 12.9
assembles the same PTX right. A register that holds a value for something else is not seen.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from triton import knobs

ALL = (1 << 64) - 1
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z]\S*)\s*([^;]*);|^(\.L_x_\d+):", re.MULTILINE)
_REGISTER = re.compile(r"(gdesc\[)?\bUR(\d+)\b")


class Instruction(NamedTuple):
    """One instruction; sets of uniform registers are integers with a bit for each.

    Attributes:
        address: in the kernel, in bytes, hexadecimal.
        text: without its guard.
        reads: the registers that it reads.
        writes: those that it writes; of a call, all.
        target: the label that it may jump to, or "".
        ends: whether the next instruction does not follow.
    """

    address: str
    text: str
    reads: int
    writes: int
    target: str
    ends: bool


def unwritten(code: Any) -> str | None:
    """The first read of a register that nothing has written, in words; None if there is none.

    Disassembly takes half a second, so only kernels with descriptors are looked at: those with wgmma, of sm_90.

    Args:
        code: a compiled kernel's `asm`.
    """
    if "wgmma.mma_async" not in code["ptx"]:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next((f"its machine code reads {one}: a fault of ptxas" for one in unwritten_reads(listing)), None)


def unwritten_reads(listing: str) -> list[str]:
    """Each read of a uniform register that no instruction on some path has written, in words.

    Args:
        listing: of one kernel, as nvdisasm --print-code prints it.

    Raises:
        ValueError: it has no instruction.
    """
    instructions, labels = _parsed(listing)
    if not instructions:
        raise ValueError(f"listing: got {listing[:60]!r}, without an instruction; allowed: what nvdisasm prints")
    # The registers written on all paths to an instruction, of all that were found so far.
    written = [ALL] * len(instructions)
    reached = {0}
    written[0] = 0
    while reached:
        place = reached.pop()
        one = instructions[place]
        after = written[place] | one.writes
        following = [labels[one.target]] if one.target in labels else []
        for each in following if one.ends else (*following, place + 1):
            if each < len(instructions) and written[each] & after != written[each]:
                written[each] &= after
                reached.add(each)
    return [
        f"UR{(missing & -missing).bit_length() - 1}, which nothing has written ({one.address}: {one.text})"
        for one, before in zip(instructions, written, strict=True)
        if (missing := one.reads & ~before)
    ]


def _parsed(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and the place of the first one behind each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for address, guard, operation, operands, label in _LINE.findall(listing):
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append(_instruction(address, guard, operation, operands.strip()))
    return instructions, labels


def _instruction(address: str, guard: str, operation: str, operands: str) -> Instruction:
    name = operation.partition(".")[0]
    first, _, others = operands.partition(",")
    writes = 0
    if written := re.fullmatch(r"UR(\d+)", first):
        width = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
        writes = _set(range(int(written[1]), int(written[1]) + width))
    reads = 0 if guard == "!PT" else _set(_read(others if written else operands, operation.startswith("UIADD3.64")))
    jump = re.search(r"`\((\.L_x_\d+)\)", operands) if name == "BRA" else None
    # A branch may also depend on a predicate among its operands.
    always = not guard and not re.search(r"\bU?P\d", operands)
    ends = always and name in ("BRA", "EXIT", "RET")
    writes = ALL if name == "CALL" else writes
    return Instruction(address, f"{operation} {operands}", reads, writes, jump[1] if jump else "", ends)


def _read(operands: str, pairs: bool) -> Iterator[int]:
    """The registers among operands: pairs of them, where each number has 64 bits, as descriptors have.

    That of the second factor of a product is behind that of the first one, which may be in other registers instead.
    """
    for register in _REGISTER.finditer(operands):
        factors, number = register[1], int(register[2])
        if factors:
            yield from (number + 2, number + 3)
        if not factors or operands[: register.start()].count(",") < 2:
            yield from (number, number + 1) if factors or pairs else (number,)


def _set(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in set(numbers))
