"""The judge fails every wrong kernel, by a property that names the fault, and passes every right one.

Both sets run once, in two worker processes; the tests share the results (with `pytest -n`, use `--dist loadfile`).
With `-k`, only the kernels of the selected tests run.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.case import DTYPES
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.running.runner import Task, run
from conformance.running.search import Result
from conformance.specs import specs
from tests.judge import cheats, wrong, wrong_process
from tests.judge.contract import WRONG
from tests.judge.mutants import MUTANTS
from tests.judge.right import OF_A_CPU, RIGHT
from tests.judge.sources import edited
from tests.processes import PATIENCE
from unsloth_ref import kernels as reference

ROOT = Path(__file__).parents[2]
OPERATIONS = tuple(reference.__all__)
EXPECTED = {
    f"tests.judge.mutants.{name}": (op, mutant.properties, mutant.dtype) for name, (op, mutant) in MUTANTS.items()
}
FILES_OF_WRONG = (cheats, wrong, wrong_process)  # importing them fills WRONG
EXPECTED |= WRONG
OF_RARE_CASES = {f"tests.judge.mutants.{name}" for name, (_, mutant) in MUTANTS.items() if mutant.rare}
CORRECT = {f"tests.judge.right.{name}": op for name, (op, _) in RIGHT.items()}
# The cases of ci, without shrinking a failing one, and without the second that exploring each kernel takes.
BRIEF = replace(PROFILES["ci"], name="brief", shrink_seconds=0, explored=0)
# For what only some cases of a cover show: more of them, in all dtypes, which share them out.
RARE = replace(PROFILES["ci"], name="rare", shrink_seconds=0, examples=40)
FEW = replace(BRIEF, name="few", examples=5)  # for right kernels, which pass every property
# torch.compile takes seconds per graph: one forward and one backward pass in each of two dtypes.
COMPILED = [backend for backend in CORRECT if backend.endswith("_compiled")]
Results = dict[str, list[Result]]


class Brief(Task):
    """A task in a profile of this file, which a worker process does not know."""

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        PROFILES.update({profile.name: profile for profile in (BRIEF, RARE, FEW)})
        return super().__call__(notify)


def judged(tasks: list[Task], stop_at_failure: bool) -> Results:
    """The results of each backend."""
    results: Results = {task.backend: [] for task in tasks}
    for task, result in run(tasks, lambda *_: None, jobs=2, stop_at_failure=stop_at_failure):
        results[task.backend].append(result)
    return results


def selected(request: pytest.FixtureRequest, backends: Iterable[str]) -> list[str]:
    """Those of these backends that a test of this run is about."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    asked = {test.callspec.params.get("backend") for test in tests}
    return [backend for backend in backends if backend in asked]


@pytest.fixture(scope="session")
def of_wrong(request: pytest.FixtureRequest) -> Results:
    """Each wrong kernel under the properties that may find it."""
    return judged(
        [
            Brief(backend, op, name, dtype, "cpu", RARE.name if backend in OF_RARE_CASES else BRIEF.name)
            for backend in selected(request, EXPECTED)
            for op, names, own in [EXPECTED[backend]]
            for name in names
            for dtype in (DTYPES if backend in OF_RARE_CASES else [own])
        ],
        stop_at_failure=True,
    )


def tasks_of_right(backend: str) -> list[Task]:
    op = CORRECT[backend]
    if backend in COMPILED:
        case = specs()[op].case(5, 130)
        return [Brief(backend, op, "extents", dtype, "cpu", case=case) for dtype in ("float32", "bfloat16")]
    # Everything takes 100 s per kernel: a sixteenth of the properties, each in one dtype; the next kernel has others.
    # `python -m tests.judge.power measure --population right` runs all properties.
    turn, dtypes = list(CORRECT).index(backend), tuple(DTYPES)
    return [
        Brief(backend, op, name, dtypes[(turn + index) // 8 % len(dtypes)], "cpu", FEW.name)
        for index, name in enumerate(PROPERTIES)
        if (turn + index) % 16 == 0
    ]


@pytest.fixture(scope="session")
def of_right(request: pytest.FixtureRequest) -> Results:
    """Each right kernel under the properties and dtypes of `tasks_of_right`."""
    tasks = [task for backend in selected(request, CORRECT) for task in tasks_of_right(backend)]
    return judged(tasks, stop_at_failure=False)


@pytest.mark.parametrize("op", OPERATIONS)
def test_there_are_enough_wrong_and_right_kernels(op: str) -> None:
    assert sum(expected[0] == op for expected in EXPECTED.values()) >= 12
    right = {name for name, (own, _) in RIGHT.items() if own == op}
    assert len(right) >= 4
    # An attention that keeps NaN within its document, without reading lengths, would take memory for all pairs of
    # tokens and columns.
    assert len(right - OF_A_CPU) >= (1 if op == "packed_attention" else 2)


def test_only_right_kernels_are_left_to_a_cpu() -> None:
    assert RIGHT.keys() >= OF_A_CPU


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXPECTED)
def test_a_wrong_kernel_fails(backend: str, of_wrong: Results) -> None:
    # A property that runs while another one fails may end after it.
    found = [result for result in of_wrong[backend] if result.verdict == "fail"]
    assert found
    for result in found:
        assert result.case and result.message
        if result.property != "compiles":  # whose finding is that compiling raises
            crashed = result.message.startswith(("raised", "backward raised", "LookupError", "ImportError"))
            assert not crashed, result.message


@pytest.mark.slow
@pytest.mark.parametrize("backend", CORRECT)
def test_a_right_kernel_passes(backend: str, of_right: Results) -> None:
    failed = [f"{r.property} / {r.dtype}: {r.message} ({r.case})" for r in of_right[backend] if r.verdict == "fail"]
    assert not failed, "\n".join(failed)
    assert len(of_right[backend]) == len(tasks_of_right(backend))


EDITS = {name: (op, mutant.edits) for name, (op, mutant) in MUTANTS.items()}
EDITS |= {name: (op, variant) for name, (op, variant) in RIGHT.items() if not callable(variant)}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_matches_its_line_and_changes_it(name: str) -> None:
    op, edits = EDITS[name]
    assert edits
    assert all(old != new for old, new in edits)
    edited(op, name, edits)


def test_an_edit_without_its_line_is_refused() -> None:
    with pytest.raises(ValueError, match=r"edits of stale: 'no such line' occurs 0 times"):
        edited("swiglu", "stale", [("no such line", "")])


def conformance(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m conformance`, in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", "conformance", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


def test_the_command_line_fails_a_wrong_kernel_and_the_printed_line_fails_again() -> None:
    backend = "tests.judge.mutants.rms_norm_eps_hard_coded"
    arguments = ("--device", "cpu", "--dtype", "float32", "--property", "value", "--profile", "ci")
    ran = conformance("run", "rms_norm", "--backend", backend, *arguments)
    assert ran.returncode == 1, ran.stderr
    assert "FAIL rms_norm / value / float32: gate G" in ran.stdout
    assert "smallest case: rows=1 hidden=1 eps=" in ran.stdout
    (line,) = [line for line in ran.stdout.splitlines() if "reproduce:" in line]
    command, case = line.partition("conformance ")[2].rstrip("'").split(" '")
    again = conformance(*command.split(), case, "--device", "cpu")
    assert again.returncode == 1, again.stderr
    assert "FAIL rms_norm / value / float32: gate G" in again.stdout


def test_the_command_line_passes_a_right_kernel() -> None:
    arguments = ("swiglu", "--backend", "tests.judge.right.swiglu_by_sigmoid", "--device", "cpu", "--property", "value")
    ran = conformance("run", *arguments, "--jobs", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 of 3 checks failed" in ran.stdout
