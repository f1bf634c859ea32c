"""Automatic mutants: which faults are planted, which code is mutated, what the judge makes of a sample of them."""

import sys
import textwrap
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import backends
from conformance.cli import main
from conformance.mutate import report
from conformance.mutate.campaign import Campaign, Original, Outcome, choose, users
from conformance.mutate.edits import mutants
from conformance.mutate.equivalent import Equivalent, confirmed, stale
from conformance.mutate.examine import Examination
from conformance.mutate.mutant import Mutant, SourceFile
from conformance.mutate.reach import Reach
from conformance.mutate.sources import SHARED, import_edited, sources_of
from conformance.running.coverage import Reached
from conformance.running.runner import CASE_TIMEOUT_SECONDS, Task, alone, run
from conformance.running.search import Result
from conformance.trial import BackendError

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "unsloth_fast" / "kernels"
QUICK_PROPERTIES = ("one_at_a_time", "argument_kinds", "value")
here = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="judging on the CPU would select Triton's interpreter for the other tests of this process",
)


def source(text: str, names: frozenset[str] | None = None) -> SourceFile:
    return SourceFile("m", Path("m.py"), "m.py", textwrap.dedent(text), names)


def changes(text: str) -> set[tuple[str, str]]:
    """(kind, the changed lines) of every mutant."""
    return {(mutant.kind, mutant.change[1]) for mutant in mutants(source(text))}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "x = tl.load(p + i, (i < n) & (j < m), other=0.0).to(tl.float32)",
            {
                ("mask-dropped", "x = tl.load(p + i).to(tl.float32)"),
                ("other-changed", "x = tl.load(p + i, (i < n) & (j < m), other=1.0).to(tl.float32)"),
                ("and-dropped", "x = tl.load(p + i, (i < n), other=0.0).to(tl.float32)"),
                ("widened", "x = tl.load(p + i, (i <= n) & (j < m), other=0.0).to(tl.float32)"),
                ("narrowed", "x = tl.load(p + i, (i < (n) - 1) & (j < m), other=0.0).to(tl.float32)"),
                ("flipped", "x = tl.load(p + i, (i >= n) & (j < m), other=0.0).to(tl.float32)"),
                ("arithmetic", "x = tl.load(p - i, (i < n) & (j < m), other=0.0).to(tl.float32)"),
                ("cast-dropped", "x = tl.load(p + i, (i < n) & (j < m), other=0.0)"),
            },
        ),
        ("tl.store(p, x, mask=i < n)", {("mask-dropped", "tl.store(p, x)"), ("call-dropped", "pass")}),
        ("s += tl.sum(x, 1)", {("axis", "s += tl.sum(x, 0)"), ("update-replaced", "s = tl.sum(x, 1)")}),
        ("s += tl.sum(x, 1)", {("update-dropped", "pass"), ("arithmetic", "s -= tl.sum(x, 1)")}),
        ("i = q.to(tl.int64) * 2", {("cast-dropped", "i = q * 2"), ("constant", "i = q.to(tl.int64) * 3")}),
        ("y = x * 2.0", {("constant", "y = x * 2.02"), ("arithmetic", "y = x + 2.0")}),
        ("z = tl.maximum(x, y)", {("minmax", "z = tl.minimum(x, y)")}),
        ("b = x.new_zeros((n, m))", {("scratch-halved", "b = x.new_zeros(((n) // 2, m))")}),
        ("b = x.new_zeros((n, m))", {("zeros-dropped", "b = x.new_empty((n, m))")}),
        ("ctx.save_for_backward(x, w)", {("exchanged", "ctx.save_for_backward(w, x)")}),
        (
            "launch(k, x.shape[0], ROWS=r, num_warps=8)",
            {("option", "launch(k, x.shape[0], ROWS=2 * (r), num_warps=8)")},
        ),
        ("launch(k, x.shape[0], ROWS=r, num_warps=8)", {("option", "launch(k, x.shape[0], ROWS=r, num_warps=2 * 8)")}),
        ("y = a if FLAG else b", {("branch", "y = a"), ("branch", "y = b")}),
    ],
)
def test_the_faults_of_a_statement(statement: str, expected: set[tuple[str, str]]) -> None:
    assert expected <= changes(f"def f(*a):\n    {statement}\n")


def test_neither_docstrings_nor_annotations_nor_messages_are_mutated() -> None:
    found = changes('''
        def f(x: "int | None" = None, *, y: tuple[int, int]) -> int | None:
            """1 + 1"""
            raise ValueError(f"{x + 1}")
    ''')
    assert found == set()


def test_every_mutant_of_the_kernels_is_python_with_a_name_of_its_own() -> None:
    for file in ("_gated.py", "rope.py", "_cross_entropy_total.py"):
        text = (KERNELS / file).read_text()
        found = mutants(SourceFile("m", KERNELS / file, file, text))
        assert len(found) > 100
        assert len({mutant.name for mutant in found}) == len(found)
        for mutant in found:
            compile(mutant.text, mutant.name, "exec")
            assert mutant.change[0] != mutant.change[1]


def test_an_operation_is_the_code_that_its_function_names() -> None:
    function = import_module("unsloth_fast.kernels").swiglu
    found = {one.path.name: one.names for one in sources_of(function)}
    assert set(found) == {"swiglu.py", "_gated.py"}
    assert "gated_backward_kernel" in (found["_gated.py"] or ())
    assert not any(f"{file.rsplit('.', 1)[-1]}.py" in found for file in SHARED)
    (only,) = sources_of(function, [KERNELS / "_launch.py"])
    assert only.path == KERNELS / "_launch.py"
    with pytest.raises(BackendError, match=r"--file: got .*rope.py; allowed: .*_gated.py"):
        sources_of(function, [KERNELS / "rope.py"])


def test_a_changed_text_is_imported_in_place_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "subject_of_mutation.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import_edited("subject_of_mutation", "def f():\n    return 2\n")
    module: Any = import_module("subject_of_mutation")
    assert module.f() == 2
    with pytest.raises(RuntimeError, match="subject_of_mutation: imported already"):
        import_edited("subject_of_mutation", "")
    del sys.modules["subject_of_mutation"]


def branches(x: int) -> int:
    return (x + 1 if x > 0 else x - 1) * 2


def test_an_expression_counts_as_reached_if_its_instructions_run() -> None:
    text = Path(__file__).read_text()
    chosen = [
        mutant
        for mutant in mutants(SourceFile("m", Path(__file__), "test_mutate.py", text, frozenset({"branches"})))
        if mutant.kind == "arithmetic"
    ]
    reach = Reach([(__file__, mutant.region) for mutant in chosen if mutant.region])
    with reach.tracing():
        branches(3)
    reached = {mutant.change[1] for index, mutant in enumerate(chosen) if index in reach.seen}
    assert reached == {"return (x - 1 if x > 0 else x - 1) * 2", "return (x + 1 if x > 0 else x - 1) + 2"}


def of_kernels(entries: list[Equivalent]) -> list[Mutant]:
    """All mutants of the functions that the entries name."""
    found = []
    for file in {entry.file for entry in entries}:
        names = {entry.function.partition(".")[0] for entry in entries if entry.file == file}
        every = None if "" in names else frozenset(names)
        found += mutants(SourceFile("", ROOT / file, file, (ROOT / file).read_text(), every))
    return found


def test_every_confirmed_mutant_still_exists_and_has_a_reason() -> None:
    entries = confirmed()
    assert stale(entries, of_kernels(entries)) == []
    assert all(len(entry.reason) > 20 and entry.confirmed for entry in entries)


def test_a_confirmation_of_a_line_that_has_changed_is_stale() -> None:
    (mutant, *_) = found = mutants(source("def f(i, n):\n    return i < n\n"))
    old, new = mutant.change
    entry = Equivalent("m.py", "f", old, (new,), "reason", "somebody")
    assert entry.matches(mutant)
    assert stale([entry], found) == []
    for changed in (
        replace(entry, old="return i < m"),
        replace(entry, new=("return i",)),
        replace(entry, function="g"),
    ):
        assert not changed.matches(mutant)
        assert stale([changed], found) == [changed]


def survivors(outcomes: list[Outcome]) -> list[str]:
    return [f"{outcome.mutant.name} {outcome.mutant.change[1]}" for outcome in outcomes if outcome.survives]


def test_a_sample_stays_the_same_when_lines_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that move change no fault of a sample; code that is added replaces only a few."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "def swiglu(gate, up):\n" + "".join(f"    x{n} = gate + {n} < up\n" for n in range(9)) + "    return x8\n"
    drawn = []
    for name, text in (("one", code), ("two", f"import math\n\n\n{code}"), ("three", f"def f(a):\n    a < 1\n{code}")):
        (tmp_path / f"sampled_{name}.py").write_text(text)
        judged = backends.load(f"sampled_{name}", "cpu")
        drawn.append({(m.kind, m.change) for _, m in choose(judged, ["swiglu"], sample=6)})
        assert len(drawn[-1]) == 6
    assert (
        drawn[0]
        == drawn[1]
        == drawn[2]
        != {(m.kind, m.change) for _, m in choose(judged, ["swiglu"], sample=6, seed=1)}
    )


@here
def test_most_of_a_sample_is_killed() -> None:
    """Three quick properties and few cases kill five sixths of the mutants that can be killed."""
    judged = backends.load("fast", "cpu")
    chosen = choose(judged, ["swiglu"], sample=8)
    campaign = Campaign("fast", "cpu", "dev", QUICK_PROPERTIES, ("float32",), jobs=2, confirmed=confirmed("cpu"))
    outcomes, originals = campaign.run(chosen, users(judged, chosen), lambda outcome: None)
    assert not any(original.failed for original in originals.values())
    assert len(outcomes) == 8
    assert report.rate(outcomes) >= 5 / 6, survivors(outcomes)
    assert "mutants killed" in report.closing(outcomes)
    assert report.matrix(outcomes).startswith("kind")


def test_checks_that_take_gigabytes_wait_for_each_other_and_say_so() -> None:
    class Waited(Exception):
        pass

    def waiting() -> None:
        raise Waited

    with alone("int64_offsets"):
        with alone("value", waiting):
            pass
        with pytest.raises(Waited), alone("int64_offsets", waiting):
            pass


def test_a_check_in_which_the_unchanged_backend_dies_says_nothing_about_mutants() -> None:
    original = Original()
    reached = Reached(1, 2)
    original.add(Result("rope", "", None, "fail", case="value float32: heads=1", message="died", reached=reached))
    assert not original.passes(("value", "float32"))
    assert original.passes(("value", "float16"))
    assert original.failed[0].case == "heads=1"


@here
def test_a_mutant_may_hang_or_crash_or_fail_to_import() -> None:
    text = (ROOT / "tests" / "judge" / "right" / "swiglu.py").read_text()
    line = "    wide = gate.float()\n"
    expected = {
        "    import time\n\n    time.sleep(1000)\n": "no result in 5 s: the process was stopped",
        "    import os\n\n    os.abort()\n": "the process died (SIGABRT)",
        "    raise ValueError(gate.shape)\n": "raised ValueError: torch.Size",
        "    wide = gate.float(\n": "raised BackendError: backend: got 'tests.judge.right",
    }
    tasks: dict[Task, str] = {
        Examination(
            "tests.judge.right.swiglu_by_sigmoid", "swiglu", "", None, "cpu", "dev",
            edited=("tests.judge.right.swiglu", text.replace(line, new, 1)), checks=(("value", "float32"),),
        ): message
        for new, message in expected.items()
    }  # fmt: skip
    hangs, *others = tasks
    for some, seconds in (([hangs], 5), (others, CASE_TIMEOUT_SECONDS)):
        found = run(some, lambda *_: None, jobs=2, timeout=seconds, preload=["conformance.mutate.examine"])
        assert [result.verdict for _, result in found] == ["fail"] * len(some)
        for task, result in found:
            assert (result.message or "").startswith(tasks[task]), result.message


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (("soup",), "operation: got 'soup'"),
        (("swiglu", "--sample", "0"), "--sample: got 0; allowed: 1 or more"),
        (("swiglu", "--mutant", "no"), "--mutant: got 'no'"),
        (("swiglu", "--backend", "torch", "--file", "no.py"), "--file: got no.py; allowed: "),
        (("lora_linear", "--backend", "tests.judge.right.rms_norm_of_torch"), "has no mutants for lora_linear"),
    ],
)
@here
def test_a_usage_error_is_one_line(arguments: tuple[str, ...], seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("mutate", *arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert seen in printed.err
    assert printed.err.count("\n") == 1
