"""What Triton makes of a backend's kernels for cards that need not be here: registers, stack, shared memory, widths.

Each operation runs forward and backward on the shapes that its spec times, with few rows, on the CPU. Every launch of a
Triton kernel is answered by compiling it for all targets instead: no output is ever written, and no GPU is needed.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from conformance.backends import Judged
from conformance.bench.measure import bench_case
from conformance.case import LAYOUTS
from conformance.report import commit, versions
from conformance.search import DTYPES
from conformance.spec import Spec, specs
from conformance.trial import Caught, Trial, describe

NAME_WIDTH, CELL_WIDTH = 36, 24
ROWS = 64  # launch parameters that depended on the number of rows would change a row's bits with it


@dataclass(frozen=True)
class Target:
    """A kind of card.

    Attributes:
        triton: as Triton calls it.
        shared: bytes of shared memory that one program may have.
    """

    triton: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Print:
    """One kernel of one operation on one target.

    Attributes:
        shape: the name of the shape in the operation's spec.
        kernel: its name; a kernel that is launched with several sets of parameters is there several times.
        registers: of a thread.
        stack: bytes of memory of a thread, into which registers spill.
        shared: bytes of shared memory of a program.
        load: bytes of the widest load from global memory.
        store: bytes of the widest store to it.
        problem: why there is no such kernel, or why it cannot be launched there; None if nothing is wrong.
    """

    op: str
    shape: str
    dtype: str
    kernel: str
    target: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    load: int = 0
    store: int = 0
    problem: str | None = None


def fingerprints(judged: Judged, ops: Sequence[str], targets: Sequence[str], dtype: str) -> Iterator[list[Print]]:
    """The prints of each operation on each of its shapes: kernel by kernel as they are launched, target by target.

    Args:
        judged: the backend; its functions must take tensors on a CPU, which here those of unsloth_fast do.
        ops: names of operations; those that it does not define, and those that launch nothing, are left out.
        targets: names in TARGETS.
        dtype: of the inputs, a name in DTYPES.

    Raises:
        Failure: a function raised.
    """
    for op in ops:
        spec = specs()[op]
        for shape in spec.bench if op in judged.functions else ():
            launches: dict[tuple[Print, ...], None] = {}  # those that are alike once
            blanks = [Print(op, shape, dtype, "", target) for target in targets]
            with _compiled_not_launched(blanks, launches.setdefault):
                _run(Trial(spec, judged.functions[op], DTYPES[dtype], "cpu"), spec, shape)
            if launches:
                yield [one for prints in launches for one in prints]


def _run(trial: Trial, spec: Spec, shape: str) -> None:
    case = bench_case(spec, shape)
    case = case.resized(**{spec.row_dimension: min(ROWS, case.size(spec.row_dimension))})
    inputs = trial.inputs(case)
    inputs |= {name: LAYOUTS[spec.bench_layout](inputs[name]) for name in spec.grads if name in inputs}
    trial.run(case, inputs, grads=spec.bench[shape].get("grads"))


class _Elsewhere:
    """Triton's driver of a card that is not here."""

    def __init__(self, index: int, target: GPUTarget) -> None:
        self._index, self._target = index, target

    def get_current_device(self) -> int:
        return self._index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def _compiled_not_launched(blanks: Sequence[Print], tell: Callable[[tuple[Print, ...]], Any]) -> Iterator[None]:
    original: Any = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        prints = []
        for index, blank in enumerate(blanks):
            driver.set_active(_Elsewhere(index, TARGETS[blank.target].triton))  # type: ignore[arg-type]  # all it takes
            made = replace(blank, kernel=kernel.__name__)
            with Caught() as raised:
                made = _read(original(kernel, *arguments, grid=grid, warmup=True, **options), made)
            problem = made.problem if raised.error is None else describe(raised.error)
            prints.append(replace(made, problem=problem))
        tell(tuple(prints))

    # Kernels of unsloth_fast are launched with tensors on a CPU in the interpreter alone, through JITFunction.run.
    interpreted = patch("unsloth_fast.kernels._launch.INTERPRETED", True)
    with patch.object(driver, "_active", None), patch.object(JITFunction, "run", run), interpreted:
        yield


def _read(compiled: Any, blank: Print) -> Print:
    """The print of a compiled kernel."""
    target, shared = TARGETS[blank.target], compiled.metadata.shared
    registers, stack, load, store = (_of_nvidia if target.triton.backend == "cuda" else _of_amd)(compiled.asm)
    problem = None
    if shared > target.shared:
        problem = f"takes {shared} bytes of shared memory; {blank.target} has {target.shared}"
    return replace(blank, registers=registers, stack=stack, shared=shared, load=load, store=store, problem=problem)


def _of_nvidia(code: Any) -> tuple[int, int, int, int]:
    """Registers, bytes of stack, and bytes of the widest load and store of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(number) for number in re.findall(r"(?:REG|STACK):(\d+)", usage))
    widest = {"ld": 0, "st": 0}
    for kind, count, bits in re.findall(r"(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", code["ptx"]):
        widest[kind] = max(widest[kind], int(count or 1) * int(bits) // 8)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global .*?\], \[.*?\], 0x(\w+)", code["ptx"])
    return registers, stack, max(widest["ld"], *(int(copied, 16) for copied in copies), 0), widest["st"]


def _of_amd(code: Any) -> tuple[int, int, int, int]:
    """Registers (of vectors), bytes of stack, and bytes of the widest load and store of a thread."""
    (registers,) = re.findall(r"\.vgpr_count: +(\d+)", code["amdgcn"])
    (stack,) = re.findall(r"\.private_segment_fixed_size: +(\d+)", code["amdgcn"])
    widest = {"load": 0, "store": 0}
    for kind, count in re.findall(r"(?:global|buffer)_(load|store)_dword(?:x(\d))?", code["amdgcn"]):
        widest[kind] = max(widest[kind], 4 * int(count or 1))
    return int(registers), int(stack), widest["load"], widest["store"]


def heading(judged: Judged, targets: Sequence[str], dtype: str) -> str:
    """What the table shows, and its columns."""
    return "\n".join(
        (
            f"backend {judged.name}, {dtype}, Triton {versions()['triton']}",
            "registers of a thread + bytes of its stack, KiB of shared memory, bytes of the widest load / store",
            " " * NAME_WIDTH + "".join(f"{target:<{CELL_WIDTH}}" for target in targets).rstrip(),
        )
    )


def text(prints: Sequence[Print]) -> str:
    """A line a kernel of one shape, a column a target; below, what cannot be launched."""
    count = len({one.target for one in prints})
    lines = [f"{prints[0].op} {prints[0].shape}"]
    for first in range(0, len(prints), count):
        cells = "".join(f"{_cell(one):<{CELL_WIDTH}}" for one in prints[first : first + count])
        lines.append(f"  {prints[first].kernel:<{NAME_WIDTH - 2}}{cells.rstrip()}")
    lines += [f"  FAIL {one.kernel} / {one.target}: {one.problem}" for one in prints if one.problem]
    return "\n".join(lines)


def _cell(one: Print) -> str:
    if one.problem:
        return "FAIL"
    return f"{one.registers:>3} + {one.stack:<4}{one.shared / 1024:>4.0f} K {one.load:>3} /{one.store:>3}"


def write_json(path: Path, prints: Sequence[Print], judged: Judged) -> None:
    """The same for machines: {"meta": {...}, "results": [a print, ...]}."""
    meta = {"versions": versions(), "backend": judged.name, "commit": commit()}
    path.write_text(json.dumps({"meta": meta, "results": [asdict(one) for one in prints]}, indent=1) + "\n")
