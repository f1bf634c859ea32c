"""The judge fails every wrong training piece by the expected properties, and passes every right one."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import pytest
from hypothesis import given

import unsloth_fast.training
import unsloth_ref.training
from conformance.cli import main
from conformance.piece import PieceCase
from conformance.pieces import pieces
from conformance.profiles import PROFILES
from conformance.runner import Task, run
from conformance.search import Result

HERE = "tests.judge.pieces"
FILES = {file.name: import_module(f"{HERE}.{file.name}") for file in iter_modules(import_module(HERE).__path__)}
WRONG = {f"{HERE}.{path}.{name}": e for path, file in FILES.items() for name, e in file.collected.wrong.items()}
RIGHT = {f"{HERE}.{path}.{name}": op for path, file in FILES.items() for name, op in file.collected.right.items()}
# The ci profile without shrinking.
BRIEF = replace(PROFILES["ci"], name="brief", shrink_seconds=0)


class Brief(Task):
    """A task in the profile above, which a worker process must register first."""

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        PROFILES[BRIEF.name] = BRIEF
        return super().__call__(notify)


@pytest.fixture(scope="module")
def results() -> dict[str, list[Result]]:
    """Results of each wrong piece for the properties that must fail, and of each right piece for all properties."""
    asked = WRONG | {backend: (op, tuple(pieces()[op].properties)) for backend, op in RIGHT.items()}
    found: dict[str, list[Result]] = {backend: [] for backend in asked}
    checks = [
        Brief(backend, op, name, None, "cpu", BRIEF.name) for backend, (op, names) in asked.items() for name in names
    ]
    for check, result in run(checks, lambda *_: None, jobs=1):
        found[check.backend].append(result)
    return found


def test_every_piece_has_wrong_variants_and_the_largest_have_several_right_ones() -> None:
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
def test_both_packages_raise_the_same_error_for_every_mistake(op: str, package: ModuleType) -> None:
    for mistake in pieces()[op].mistakes:
        positional, keywords = mistake.arguments()
        with pytest.raises(mistake.raises, match=mistake.names) as raised:
            getattr(package, op)(*positional, **keywords)
        assert raised.type is mistake.raises, mistake.what


@pytest.mark.parametrize("op", unsloth_ref.training.__all__)
def test_parsing_a_printed_case_returns_the_case(op: str) -> None:
    piece = pieces()[op]

    def round_trip(case: PieceCase) -> None:
        assert all("=" in word for word in str(case).split())  # no value has spaces
        assert "'" not in str(case)
        assert piece.parse(str(case)) == case

    round_trip(piece.simplest)
    PROFILES["dev"].settings(16)(given(piece.draw(64))(round_trip))()


@pytest.mark.parametrize(
    ("line", "why"), [("lengths=[1]", "missing: capacity"), ("lengths=[1] capacity=2 size=3", "got 'size=3'")]
)
def test_an_invalid_case_is_rejected(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pieces()["pack"].parse(line)


def test_the_command_line_fails_a_wrong_piece_and_prints_a_line_that_reproduces_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    properties = ("--property", "structure", "order")
    assert main(["run", "pack", "--backend", f"{HERE}.pack.short_integers", *properties, "--jobs", "1"]) == 1
    ran = capsys.readouterr().out
    assert "FAIL pack / structure: offsets is torch.int32 [1] on cpu, should be int64" in ran
    assert "smallest case: lengths=[] capacity=1 strategy=bfd\n" in ran
    assert "1 of 2 checks failed" in ran
    (line,) = [line for line in ran.splitlines() if "reproduce:" in line]
    command, case = line.partition("conformance ")[2].rstrip("'").split(" '")
    assert main([*command.split(), case]) == 1
    assert "FAIL pack / structure: offsets is torch.int32" in capsys.readouterr().out
    assert main(["repro", case, "--backend", f"{HERE}.pack.by_bisection"]) == 0
    assert capsys.readouterr().out.startswith("ok   pack / structure: lengths=[] capacity=1")


def test_an_unknown_property_is_rejected_with_the_names_of_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repro", "pack value lengths=[1] capacity=2"]) == 2
    printed = capsys.readouterr().err
    assert "got 'value'" in printed and "tokens_kept" in printed
