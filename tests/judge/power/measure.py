"""Runs the judge and the oracles of other projects on every wrong and every right kernel of the tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from conformance import backends
from conformance.properties import PROPERTIES
from conformance.report import versions
from conformance.runner import Task, run
from conformance.search import DTYPES, Result
from conformance.specs import specs
from tests.judge import cheats, wrong, wrong_process
from tests.judge.contract import WRONG
from tests.judge.mutants import MUTANTS
from tests.judge.power.oracles import LIGER, ORACLES
from tests.judge.right import RIGHT

JUDGE = "conformance"
FILES_OF_WRONG = (cheats, wrong, wrong_process)  # importing them fills WRONG


@dataclass(frozen=True)
class Kernel:
    """One kernel of the tests.

    Attributes:
        backend: its dotted path.
        op: its operation.
        population: "mutants", "wrong", "cheats" or "right".
        properties: those that may find it, checked before the others; empty for a right kernel.
        dtypes: in which the judge checks it.
    """

    backend: str
    op: str
    population: str
    properties: tuple[str, ...]
    dtypes: tuple[str, ...]


def kernels() -> list[Kernel]:
    """Every kernel, wrong ones first."""
    found = [
        Kernel(f"tests.judge.mutants.{name}", op, "mutants", mutant.properties, (mutant.dtype,))
        for name, (op, mutant) in MUTANTS.items()
    ]
    found += [
        Kernel(name, op, "cheats" if ".cheats." in name else "wrong", properties, (dtype,))
        for name, (op, properties, dtype) in WRONG.items()
    ]
    found += [
        Kernel(f"tests.judge.right.{name}", op, "right", (), tuple(DTYPES))
        for name, (op, _) in RIGHT.items()
        if not name.endswith("_compiled")  # compiling takes seconds per case
    ]
    return found


class _Oracle(Task):
    """A task whose property is the name of an oracle; it fails if the oracle finds the kernel wrong."""

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        (oracle,) = (oracle for oracle in ORACLES if oracle.name == self.property)
        function = backends.load(self.backend, self.device).functions[self.op]
        found = oracle.finds(specs()[self.op], function, self.device)
        return Result(self.op, self.property, None, "fail" if found else "pass")


def measure(ops: Sequence[str], device: str, profile: str, jobs: int) -> dict[str, Any]:
    """Which kernels each oracle and the judge reject.

    Args:
        ops: operations; all if empty.
        device: "cpu" or "cuda".
        profile: of the judge.
        jobs: worker processes.

    Returns:
        {"meta": versions and settings, "kernels": [{"backend", "op", "population", "rejected_by"}]}; an oracle without
        a tolerance for an operation is absent from the kernel's "asked".
    """
    chosen = [kernel for kernel in kernels() if not ops or kernel.op in ops]
    asked = {kernel.backend: [o.name for o in ORACLES if o.name != "liger" or kernel.op in LIGER] for kernel in chosen}
    oracle_tasks: list[Task] = [
        _Oracle(kernel.backend, kernel.op, name, None, device) for kernel in chosen for name in asked[kernel.backend]
    ]
    rejected: dict[str, set[str]] = {kernel.backend: set() for kernel in chosen}
    for task, result in run(oracle_tasks, lambda *_: None, jobs=jobs):
        if result.verdict == "fail":
            rejected[task.backend].add(task.property)
    judge_tasks = [
        Task(kernel.backend, kernel.op, name, dtype, device, profile)
        for kernel in chosen
        for name in dict.fromkeys((*kernel.properties, *PROPERTIES))
        for dtype in kernel.dtypes
    ]
    for task, result in run(judge_tasks, lambda *_: None, jobs=jobs, stop_at_failure=True):
        if result.verdict == "fail":
            rejected[task.backend].add(JUDGE)
    return {
        "meta": {"versions": versions(), "device": device, "profile": profile},
        "kernels": [
            {
                "backend": kernel.backend,
                "op": kernel.op,
                "population": kernel.population,
                "asked": [JUDGE, *asked[kernel.backend]],
                "rejected_by": sorted(rejected[kernel.backend]),
            }
            for kernel in chosen
        ],
    }
