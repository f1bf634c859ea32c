"""What Triton compiles from a backend's kernels: registers, stack, shared memory, and widths of memory accesses.

Each operation runs forward and backward on the benchmark shapes of its spec, with few rows; one from the command line
on its example. Instead of being launched, each Triton kernel is compiled for all targets: no output is ever written,
and no GPU is needed. Tensors have no elements (PyTorch's device "meta"), so that torch's operators compute nothing
either. A function that reads elements runs on the CPU.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from conformance import machine_code
from conformance.backends import Judged
from conformance.bench.measure import bench_case
from conformance.case import DTYPES, LAYOUTS, Case, Draw
from conformance.counts import Counts
from conformance.interpreter.tuning import AbsentDriver, run_once
from conformance.reporting import results_file
from conformance.reporting.results_file import commit, versions
from conformance.running.coverage import drawn_cases
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Trial, as_leaves, describe
from unsloth_fast.kernels._launch import launched_by_triton

NAME_WIDTH, CELL_WIDTH = 36, 32
ROWS = 64  # few are enough: launch parameters do not depend on the number of rows, or a row's bits would
DRAWN = 2**18  # elements of a drawn case, at most
COLUMNS = 1024  # of a spec that has neither shapes nor an example
PROGRAM, EXECUTABLE = 1, 4  # the type and the flag of an ELF section with machine code
NOP = 0x918  # the operation that does nothing


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
        triton: Triton's description of it.
        shared: bytes of shared memory that one program may use.
    """

    triton: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Fingerprint:
    """One kernel of one operation on one target.

    Attributes:
        op: the operation.
        shape: the name of the shape in the operation's spec.
        dtype: the dtype of the inputs.
        kernel: the kernel's name; each set of launch parameters has a fingerprint of its own.
        target: a name in TARGETS.
        registers: number of registers per thread.
        stack: bytes of memory per thread, into which registers spill.
        shared: bytes of shared memory per program.
        load: bytes of the widest load from global memory.
        store: bytes of the widest store to global memory.
        instructions: number of machine instructions of the kernel, without those that fill up its last block.
        problem: why the kernel does not compile, or cannot be launched on the target, or that its machine code is wrong
            (machine_code.py); None if nothing was found.
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
    instructions: int = 0
    problem: str | None = None


def fingerprints(
    judged: Judged, ops: Sequence[Spec], targets: Sequence[str], dtype: str, cases: int = 0
) -> Iterator[list[Fingerprint]]:
    """The fingerprints of each operation on each of its shapes: per kernel, in the order of launches, per target.

    Of each drawn case, those of the kernels that have a problem on some target.

    Args:
        judged: the backend; its functions must accept tensors on another device than a GPU, as those of unsloth_fast
            do here.
        ops: the operations; those that the backend does not define or that launch no kernel are left out.
        targets: names in TARGETS.
        dtype: the dtype of the inputs, a name in DTYPES.
        cases: how many to draw, as the judge does on a GPU.

    Raises:
        Failure: a function raised.
    """
    for spec in ops:
        if spec.op not in judged.functions:
            continue
        for shape, case in _cases(spec).items():
            if launches := _of_case(judged, spec, shape, case, targets, dtype):
                yield [one for found in launches for one in found]
        for case in drawn_cases(spec, DRAWN, tuple(spec.drawing.options), cases) if cases else ():
            launches = _of_case(judged, spec, str(case), case, targets, dtype)
            if wrong := [one for found in launches if any(each.problem for each in found) for one in found]:
                yield wrong


def _of_case(
    judged: Judged, spec: Spec, shape: str, case: Case, targets: Sequence[str], dtype: str
) -> list[tuple[Fingerprint, ...]]:
    blanks = [Fingerprint(spec.op, shape, dtype, "", target) for target in targets]
    grads = spec.speed.shapes.get(shape, {}).get("grads", spec.grads)
    trial = Trial(spec, judged.functions[spec.op], DTYPES[dtype], "meta")
    try:
        return _launches(trial, case, _WithoutElements(case, trial.dtype, "meta"), grads, blanks)
    except Failure:  # it reads elements
        on_cpu = replace(trial, device="cpu")
        return _launches(on_cpu, case, Draw(case, trial.dtype, "cpu"), grads, blanks)


def _cases(spec: Spec) -> dict[str, Case]:
    """The benchmark shapes with few rows; without them the example of a learned spec, or else some rows and columns."""
    cases = {shape: bench_case(spec, shape) for shape in spec.speed.shapes}
    if cases:
        row = spec.row_dimension
        return {shape: case.resized(**{row: min(ROWS, case.size(row))}) for shape, case in cases.items()}
    sizes = spec.drawing.sizes
    example = tuple((name, size.example) for name, size in sizes.items() if isinstance(size, Counts))
    return {"example": Case(example) if len(example) == len(sizes) else spec.case(ROWS, COLUMNS)}


class _WithoutElements(Draw):
    """Builds floating-point tensors that have a shape, a dtype and strides alone."""

    def filled(self, *shape: int) -> Tensor:
        """[..., columns]."""
        return self.place(torch.empty(shape, device="meta"))

    def weight(self, size: int) -> Tensor:
        """[size]."""
        return self.filled(size)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """[rows, columns]."""
        return self.filled(rows, columns)

    def grad_output(self, like: Tensor) -> Tensor:
        """As an output, contiguous."""
        return torch.empty(like.shape, dtype=like.dtype, device="meta")


def _launches(
    trial: Trial, case: Case, draw: Draw, grads: Sequence[str], blanks: Sequence[Fingerprint]
) -> list[tuple[Fingerprint, ...]]:
    """The fingerprints of each launch on all targets, each once, in order."""
    spec = trial.spec
    inputs = spec.drawing.build(draw, **dict(case.sizes))
    inputs |= {name: LAYOUTS[spec.speed.layout](inputs[name]) for name in spec.grads if name in inputs}
    leaves = as_leaves(inputs, grads)
    by_target: list[list[Fingerprint]] = [[] for _ in blanks]
    for index, blank in enumerate(blanks):  # tiles may depend on a target's shared memory
        with (
            _compiled_not_launched(blank, index, by_target[index].append),
            # Of rows that count: all.
            shapes.patch(meta_nonzero_assume_all_nonzero=True),  # pyright: ignore[reportAttributeAccessIssue]
        ):
            outputs = trial.call(leaves, trial.options(case))
            trial.backward(outputs, leaves, grads, [draw.grad_output(output) for output in outputs])
    return list(dict.fromkeys(zip(*by_target, strict=True)))


@contextmanager
def _compiled_not_launched(blank: Fingerprint, index: int, on_launch: Callable[[Fingerprint], Any]) -> Iterator[None]:
    """Within this context kernels are compiled for the target of the blank, as the device `index`, and not launched."""
    target = TARGETS[blank.target]
    original, tuned = JITFunction.run, Autotuner.run
    absent = cast(Any, AbsentDriver)(target.triton, index)  # has the methods of a driver that are called

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        one = replace(blank, kernel=kernel.__name__)
        with Caught() as raised:
            one = _read(original(kernel, *arguments, grid=grid, warmup=True, **options), one)
        on_launch(one if raised.error is None else replace(one, problem=describe(raised.error)))

    def tuned_again(kernel: Any, *arguments: Any, **options: Any) -> None:
        kernel.cache.clear()  # of another target
        tuned(kernel, *arguments, **options)

    with (
        patch.object(driver, "_active", absent),
        patch.object(Autotuner, "do_bench", property(lambda self: run_once)),  # every configuration is compiled
        patch.object(Autotuner, "run", tuned_again),
        patch.object(JITFunction, "run", run),
        launched_by_triton(target.shared),
    ):
        yield


def _read(compiled: Any, blank: Fingerprint) -> Fingerprint:
    """The fingerprint of a compiled kernel."""
    target, shared = TARGETS[blank.target], compiled.metadata.shared
    found = (_of_nvidia if target.triton.backend == "cuda" else _of_amd)(compiled.asm)
    problem = machine_code.unwritten(compiled.asm) if target.triton.backend == "cuda" else None
    if shared > target.shared:
        problem = f"takes {shared} bytes of shared memory; {blank.target} has {target.shared}"
    return replace(blank, **found, shared=shared, problem=problem)


def _of_nvidia(code: Any) -> dict[str, int]:
    """What a cubin and its PTX show: registers, stack, load, store and instructions of a `Fingerprint`."""
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
    return {
        "registers": registers,
        "stack": stack,
        "load": max(widest["ld"], *(int(copied, 16) for copied in copies), 0),
        "store": widest["st"],
        "instructions": instructions(code["cubin"]),
    }


def instructions(cubin: bytes) -> int:
    """How many machine instructions a cubin has, without those that do nothing.

    nvdisasm lists the same ones, in half a second per kernel. A cubin is an ELF file of 64 bits (gabi.xinuos.com/elf).
    From compute capability 7.0 on an instruction has 16 bytes, and its lowest 12 bits are the operation.
    """
    (first,), (size, count) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    found = 0
    for section in range(first, first + size * count, size):
        kind, flags, _, start, length = struct.unpack_from("<IQQQQ", cubin, section + 4)
        if kind == PROGRAM and flags & EXECUTABLE:
            words = np.frombuffer(cubin, "<u2", length // 2, start)
            found += int((words[::8] & 0xFFF != NOP).sum())
    return found


def _of_amd(code: Any) -> dict[str, int]:
    """What AMD's assembly shows: vector registers, stack, load, store and instructions of a `Fingerprint`."""
    (registers,) = re.findall(r"\.vgpr_count: +(\d+)", code["amdgcn"])
    (stack,) = re.findall(r"\.private_segment_fixed_size: +(\d+)", code["amdgcn"])
    widest = {"load": 0, "store": 0}
    for kind, count in re.findall(r"(?:global|buffer)_(load|store)_dword(?:x(\d))?", code["amdgcn"]):
        widest[kind] = max(widest[kind], 4 * int(count or 1))
    operations = re.findall(r"^\t([a-z]\w+)", code["amdgcn"], re.MULTILINE)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "load": widest["load"],
        "store": widest["store"],
        "instructions": len(operations) - operations.count("s_nop") - operations.count("s_code_end"),
    }


def heading(judged: Judged, targets: Sequence[str], dtype: str) -> str:
    """The heading of the table: what it shows, and the names of its columns."""
    return "\n".join(
        (
            f"backend {judged.name}, {dtype}, Triton {versions()['triton']}",
            "registers + bytes of stack per thread, KiB of shared memory, widest load / store in bytes, instructions",
            " " * NAME_WIDTH + "".join(f"{target:<{CELL_WIDTH}}" for target in targets).rstrip(),
        )
    )


def text(found: Sequence[Fingerprint]) -> str:
    """One line per kernel of a shape, with one column per target; then the kernels that cannot be launched."""
    count = len({one.target for one in found})
    lines = [f"{found[0].op} {found[0].shape}"]
    for first in range(0, len(found), count):
        cells = "".join(f"{_cell(one):<{CELL_WIDTH}}" for one in found[first : first + count])
        lines.append(f"  {found[first].kernel:<{NAME_WIDTH - 2}}{cells.rstrip()}")
    lines += [f"  FAIL {one.kernel} / {one.target}: {one.problem}" for one in found if one.problem]
    return "\n".join(lines)


def _cell(one: Fingerprint) -> str:
    if one.problem:
        return "FAIL"
    memory = f"{one.shared / 1024:>4.0f} K {one.load:>3} /{one.store:>3}"
    return f"{one.registers:>3} + {one.stack:<4}{memory}{one.instructions:>6}"


def write_json(path: Path, found: Sequence[Fingerprint], judged: Judged) -> None:
    """The same as JSON: {"meta": {...}, "results": [a fingerprint, ...]}; a ledger takes it for this machine's card."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    meta = {"versions": versions(), "gpu": gpu, "backend": judged.name, "commit": commit()}
    results_file.write(path, meta, [asdict(one) for one in found])
