"""Runs the judge and the oracles of other projects on every wrong and every right kernel of the tests."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from conformance import backends
from conformance.case import DTYPES
from conformance.mutate.examine import profile_of
from conformance.properties import PROPERTIES
from conformance.reporting.results_file import versions
from conformance.running.runner import Task, run
from conformance.running.search import Result, search
from conformance.specs import specs
from tests.judge import cheats, wrong, wrong_process
from tests.judge.contract import WRONG
from tests.judge.mutants import MUTANTS
from tests.judge.power.oracles import asked, rejecting
from tests.judge.right import OF_A_CPU, RIGHT

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
        dtype: in which the judge checks it first.
    """

    backend: str
    op: str
    population: str
    properties: tuple[str, ...]
    dtype: str


def kernels(device: str) -> list[Kernel]:
    """Every kernel that is wrong or right on the device, wrong ones first."""
    found = [
        Kernel(f"tests.judge.mutants.{name}", op, "mutants", mutant.properties, mutant.dtype)
        for name, (op, mutant) in MUTANTS.items()
        if mutant.device in (None, device)
    ]
    found += [
        Kernel(name, op, "cheats" if ".cheats." in name else "wrong", properties, dtype)
        for name, (op, properties, dtype) in WRONG.items()
    ]
    found += [
        Kernel(f"tests.judge.right.{name}", op, "right", (), "float32")
        for name, (op, _) in RIGHT.items()
        if not name.endswith("_compiled")  # compiling takes seconds per case
        and (device == "cpu" or name not in OF_A_CPU)
    ]
    return found


class _Oracles(Task):
    """A task that asks the oracles of other projects.

    The message names those that reject the kernel. The verdict is "pass": after "fail", a worker process on a GPU would
    be replaced. If a kernel has broken the CUDA context, this raises, so that the process ends and another follows.
    """

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        function = backends.load(self.backend, self.device).functions[self.op]
        names = rejecting(specs()[self.op], function, self.device)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return Result(self.op, self.property, None, "pass", message="\n".join(names))


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
        {"meta": versions and settings, "kernels": [{"backend", "op", "population", "asked", "rejected_by", "findings",
        "cases"}]}; an oracle without a tolerance for an operation is absent from the kernel's "asked". The judge leaves
        a wrong kernel at its first finding.

    Raises:
        RuntimeError: a kernel without a change fails too, so that its mutants show nothing.
    """
    oracles: list[Task] = [_Oracles(kernel.backend, kernel.op, "oracles", None, device) for kernel in chosen]
    tasks: list[Task] = []
    for kernel in chosen:
        properties = dict.fromkeys((*kernel.properties, *PROPERTIES))
        if kernel.population == "right":  # each property in one of the dtypes
            checks = zip(properties, cycle(DTYPES), strict=False)
        else:
            checks = ((prop, dtype) for dtype in dict.fromkeys((kernel.dtype, *DTYPES)) for prop in properties)
        tasks += [_Check(kernel.backend, kernel.op, prop, dtype, device, profile) for prop, dtype in checks]
    waiting: dict[str, set[Task]] = {kernel.backend: set() for kernel in chosen}
    for task in (*oracles, *tasks):
        waiting[task.backend].add(task)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the worker processes import triton with this module
    _demand_passes({kernel.op for kernel in chosen if kernel.population == "mutants"}, device, profile, jobs)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    rejected: dict[str, set[str]] = {kernel.backend: set() for kernel in chosen}
    judged: dict[str, list[Result]] = {kernel.backend: [] for kernel in chosen}
    right = {kernel.backend for kernel in chosen if kernel.population == "right"}

    def found() -> dict[str, Any]:
        return {
            "meta": {"versions": versions(), "device": device, "gpu": gpu, "profile": profile},
            "kernels": [
                {
                    "backend": kernel.backend,
                    "op": kernel.op,
                    "population": kernel.population,
                    "asked": [JUDGE, *(oracle.name for oracle in asked(kernel.op))],
                    "rejected_by": sorted(rejected[kernel.backend]),
                    "findings": [result.as_dict() for result in judged[kernel.backend] if result.verdict == "fail"],
                    "cases": sum(result.examples for result in judged[kernel.backend]),
                }
                for kernel in chosen
                if not waiting[kernel.backend]
            ],
        }

    def on_result(task: Task, result: Result) -> None:
        left = waiting[task.backend]
        left.discard(task)
        if isinstance(task, _Check):
            judged[task.backend].append(result)
        if isinstance(task, _Oracles):
            every = [oracle.name for oracle in asked(task.op)]  # if the process ended
            rejected[task.backend].update(every if result.verdict == "fail" else (result.message or "").splitlines())
        elif result.verdict == "fail":
            rejected[task.backend].add(JUDGE)
            if task.backend not in right:  # the judge's other checks of this kernel are left out
                left.clear()
        if not left:
            on_kernel(found())

    run(oracles, on_result, jobs=jobs)  # apart: what ends their process is no reason to leave out the judge's checks
    run([task for task in tasks if task.backend not in right], on_result, jobs=jobs, stop_at_failure=True)
    run([task for task in tasks if task.backend in right], on_result, jobs=jobs)
    return found()


def _demand_passes(ops: Iterable[str], device: str, profile: str, jobs: int) -> None:
    """Raise unless the kernels that mutants are made from pass: with some versions, all of them might fail."""

    def on_result(task: Task, result: Result) -> None:
        if result.verdict == "fail":
            raise RuntimeError(f"{task.op}: the kernel without a change fails {task.property}: {result.message}")

    run([_Check("fast", op, "value", "float32", device, profile) for op in sorted(ops)], on_result, jobs=jobs)
