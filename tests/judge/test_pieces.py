"""The judge fails every wrong training piece, by a property that says what is wrong, and passes every right one."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given

import unsloth_fast.training
import unsloth_ref.training
from conformance.piece import PieceCase, pieces
from conformance.profiles import PROFILES
from conformance.runner import Task, run
from conformance.search import Result

ROOT = Path(__file__).parents[2]
HERE = "tests.judge.pieces"
FILES = {path: import_module(f"{HERE}.{path}") for path in ("pack", "collate", "param_groups", "steps", "decisions")}
WRONG = {f"{HERE}.{path}.{name}": e for path, file in FILES.items() for name, e in file.collected.wrong.items()}
RIGHT = {f"{HERE}.{path}.{name}": op for path, file in FILES.items() for name, op in file.collected.right.items()}
# The cases of ci, without making each failing one smaller.
BRIEF = replace(PROFILES["ci"], name="brief", shrink_seconds=0)


class Brief(Task):
    """A check in the profile above, which a worker process does not know."""

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        PROFILES[BRIEF.name] = BRIEF
        return super().__call__(notify)


@pytest.fixture(scope="module")
def results() -> dict[str, list[Result]]:
    """Each wrong piece under the properties that may find it, each right one under all."""
    asked = {backend: (op, laws) for backend, (op, laws) in WRONG.items()}
    asked |= {backend: (op, tuple(pieces()[op].properties)) for backend, op in RIGHT.items()}
    found: dict[str, list[Result]] = {backend: [] for backend in asked}
    checks = [Brief(backend, op, law, None, "cpu", BRIEF.name) for backend, (op, laws) in asked.items() for law in laws]
    for check, result in run(checks, lambda *_: None, jobs=2):
        found[check.backend].append(result)
    return found


def test_there_are_enough_of_both() -> None:
    for op in ("pack", "collate", "param_groups"):
        assert sum(own == op for own, _ in WRONG.values()) >= 8
        assert sum(own == op for own in RIGHT.values()) >= 2
    assert {own for own, _ in WRONG.values()} == set(unsloth_ref.training.__all__)


@pytest.mark.parametrize("backend", WRONG)
def test_a_wrong_piece_fails(backend: str, results: dict[str, list[Result]]) -> None:
    for result in results[backend]:
        assert result.verdict == "fail", result.property
        assert result.case and result.message
        assert not result.message.startswith(("NameError", "AttributeError", "AssertionError")), result.message


@pytest.mark.parametrize("backend", RIGHT)
def test_a_right_piece_passes(backend: str, results: dict[str, list[Result]]) -> None:
    failed = [f"{r.property}: {r.message} ({r.case})" for r in results[backend] if r.verdict != "pass"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("package", [unsloth_ref.training, unsloth_fast.training], ids=lambda package: package.__name__)
@pytest.mark.parametrize("op", unsloth_ref.training.__all__)
def test_both_packages_refuse_every_mistake_alike(op: str, package: ModuleType) -> None:
    for mistake in pieces()[op].mistakes:
        positional, keywords = mistake.arguments()
        with pytest.raises(mistake.raises, match=mistake.names) as raised:
            getattr(package, op)(*positional, **keywords)
        assert raised.type is mistake.raises, mistake.what


@pytest.mark.parametrize("op", unsloth_ref.training.__all__)
def test_a_case_reads_as_it_was_written(op: str) -> None:
    piece = pieces()[op]

    def written(case: PieceCase) -> None:
        assert " " not in str(case).replace(" ", "", len(str(case).split()) - 1)
        assert "'" not in str(case)
        assert piece.parse(str(case)) == case

    written(piece.plain)
    PROFILES["dev"].settings(2.0)(given(piece.draw(64))(written))()


@pytest.mark.parametrize(
    ("line", "why"), [("lengths=[1]", "missing: capacity"), ("lengths=[1] capacity=2 size=3", "got 'size=3'")]
)
def test_a_line_that_is_no_case_is_named(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pieces()["pack"].parse(line)


def conformance(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m conformance`, in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", "conformance", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_command_line_fails_a_wrong_piece_and_the_printed_line_fails_again() -> None:
    ran = conformance("run", "pack", "--backend", f"{HERE}.pack.short_integers", "--property", "structure", "order")
    assert ran.returncode == 1, ran.stderr
    assert "FAIL pack / structure: offsets is torch.int32 [1] on cpu, should be int64" in ran.stdout
    assert "smallest case: lengths=[] capacity=1 strategy=bfd\n" in ran.stdout
    assert "1 of 2 checks failed" in ran.stdout
    (line,) = [line for line in ran.stdout.splitlines() if "reproduce:" in line]
    command, case = line.partition("conformance ")[2].rstrip("'").split(" '")
    again = conformance(*command.split(), case)
    assert again.returncode == 1, again.stderr
    assert "FAIL pack / structure: offsets is torch.int32" in again.stdout
    right = conformance("repro", case, "--backend", f"{HERE}.pack.by_bisection")
    assert right.returncode == 0, right.stderr
    assert right.stdout.startswith("ok   pack / structure: PackCase(lengths=(), capacity=1")


def test_the_laws_of_a_piece_are_named_where_one_is_unknown() -> None:
    ran = conformance("repro", "pack value lengths=[1] capacity=2")
    assert ran.returncode == 2
    assert "got 'value'" in ran.stderr and "tokens_kept" in ran.stderr
