"""Runs the judge and the oracles of other projects on every wrong and every right kernel of the tests."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from conformance import backends
from conformance.mutate.examine import profile_of
from conformance.properties import PROPERTIES
from conformance.results_file import versions
from conformance.runner import Task, run
from conformance.search import DTYPES, Result, search
from conformance.specs import specs
from conformance.trial import Caught
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
        dtypes: in which the judge checks it, each property in one of them.
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
    """A task whose property is the name of an oracle.

    The verdict is "xfail" if the oracle rejects the kernel; "fail" if the kernel has broken the CUDA context too, so
    that the worker process is replaced.
    """

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        (oracle,) = (oracle for oracle in ORACLES if oracle.name == self.property)
        function = backends.load(self.backend, self.device).functions[self.op]
        found = oracle.finds(specs()[self.op], function, self.device)
        with Caught() as caught:
            if found and self.device == "cuda":
                torch.cuda.synchronize()
        return Result(self.op, self.property, None, "fail" if caught.error else "xfail" if found else "pass")


class _Check(Task):
    """A task of the judge that does not look for a smaller case."""

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        trial, prop = self._trial_and_property()
        return search(trial, prop, profile_of(self.profile), self.dtype, notify)


def measure(
    chosen: Sequence[Kernel], device: str, profile: str, jobs: int, on_kernel: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Which kernels each oracle and the judge reject.

    Args:
        chosen: the kernels.
        device: "cpu" or "cuda".
        profile: of the judge.
        jobs: worker processes.
        on_kernel: called with what was found of all kernels so far, as soon as it is known of another one.

    Returns:
        {"meta": versions and settings, "kernels": [{"backend", "op", "population", "asked", "rejected_by"}]}; an oracle
        without a tolerance for an operation is absent from the kernel's "asked".
    """
    asked = {
        kernel: [oracle.name for oracle in ORACLES if oracle.name != "liger" or kernel.op in LIGER] for kernel in chosen
    }
    asks = [_Oracle(kernel.backend, kernel.op, oracle, None, device) for kernel in chosen for oracle in asked[kernel]]
    checks: list[Task] = []
    for kernel in chosen:
        properties = dict.fromkeys((*kernel.properties, *PROPERTIES))
        dtypes = cycle(kernel.dtypes)
        checks += [_Check(kernel.backend, kernel.op, prop, next(dtypes), device, profile) for prop in properties]
    waiting = {
        kernel.backend: {task for task in (*asks, *checks) if task.backend == kernel.backend} for kernel in chosen
    }
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the worker processes import triton with this module
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    rejected: dict[str, set[str]] = {kernel.backend: set() for kernel in chosen}

    def found() -> dict[str, Any]:
        return {
            "meta": {"versions": versions(), "device": device, "gpu": gpu, "profile": profile},
            "kernels": [
                {
                    "backend": kernel.backend,
                    "op": kernel.op,
                    "population": kernel.population,
                    "asked": [JUDGE, *oracles],
                    "rejected_by": sorted(rejected[kernel.backend]),
                }
                for kernel, oracles in asked.items()
                if not waiting[kernel.backend]
            ],
        }

    def on_result(task: Task, result: Result) -> None:
        left = waiting[task.backend]
        left.discard(task)
        if isinstance(task, _Oracle):
            if result.verdict != "pass":
                rejected[task.backend].add(task.property)
        elif result.verdict == "fail":  # the judge's other checks of this kernel are left out
            rejected[task.backend].add(JUDGE)
            left.clear()
        if not left:
            on_kernel(found())

    run(asks, on_result, jobs=jobs)
    run(checks, on_result, jobs=jobs, stop_at_failure=True)
    return found()
