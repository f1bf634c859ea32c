"""What the gate calls worse, in one sentence each: checks, kernels, coverage, operations, sides, ledgers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conformance.gate import job, verdict
from conformance.gate.job import Request
from conformance.gate.ledger import Ledger, results_of
from conformance.gate.sides import Checkout, Unavailable
from conformance.verbs.gate import text


def check(op: str = "rope", name: str = "value", **values: Any) -> dict[str, Any]:
    defaults = {"verdict": "pass", "budget_use": 0.2, "coverage": None, "message": None, "case": None, "examples": 9}
    return {"op": op, "property": name, "dtype": "float32", **defaults, **values}


FAILED = {"verdict": "fail", "message": "gate G1 used 3\nmore"}
SKIPPED = {"verdict": "skip", "message": "no C++"}
KNOWN = {"verdict": "xfail", "message": "expected"}


@pytest.mark.parametrize(
    ("base", "head", "sentence", "found"),
    [
        (check(), check(), None, "same"),
        (check(), check(budget_use=0.29), None, "same"),
        (check(), check(budget_use=0.31), "budget use: got 31 %; allowed: 30 % (before: 20 %)", "regressed"),
        (check(), check(budget_use=0.05), None, "improved"),
        (check(), check(**FAILED), "passed before, and fails now: gate G1 used 3", "regressed"),
        (check(), check(**SKIPPED), "passed before, and is skipped now: no C++", "regressed"),
        (check(), check(**KNOWN), "passed before, and is a known deviation now: expected", "regressed"),
        (check(), None, "passed before, and is not checked now", "lost"),
        (None, check(), None, "new"),
        (None, check(**FAILED), "is new and fails: gate G1 used 3", "regressed"),
        (check(**FAILED), check(), None, "improved"),
        (check(**FAILED), check(**FAILED), None, "wrong"),
        (check(**SKIPPED), check(**FAILED), "did not fail before, and fails now: gate G1 used 3", "regressed"),
        (check(**SKIPPED), check(**SKIPPED), None, "same"),
    ],
)
def test_a_check_that_got_worse_is_one_sentence(base: Any, head: Any, sentence: str | None, found: str) -> None:
    sentences = [f"rope / value / float32: {sentence}"] if sentence else []
    assert verdict.property_change(base, head) == (sentences, found)


def test_a_lost_operation_is_one_sentence() -> None:
    rows = verdict.properties([check("rope"), check("rope", "layouts"), check("geglu")], [check("geglu")])
    assert [row["regressions"] for row in rows if row["regressions"]] == [["rope: is lost: it was defined before"]]


def test_coverage_that_falls_is_one_sentence() -> None:
    """Coverage is compared over the checks of both sides: a new property that covers little lowers nothing."""
    base = [check(coverage=0.8), check(name="layouts", coverage=0.6)]
    head = [check(coverage=0.5), check(name="layouts", coverage=0.6), check(name="new", coverage=0.01)]
    found = [sentence for row in verdict.properties(base, head) for sentence in row["regressions"]]
    assert found == ["rope / float32: mean coverage: got 55 %; allowed: 65 % (before: 70 %)"]
    assert not any(row["regressions"] for row in verdict.properties(base[1:], head[1:]))


PRINT = {
    "op": "rope", "shape": "llama", "dtype": "float16", "kernel": "k", "target": "sm_90", "registers": 40, "stack": 0,
    "shared": 1024, "load": 16, "store": 16, "instructions": 400, "problem": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"registers": 50}, None),
        ({"registers": 51}, "registers: got 51; allowed: 50 (before: 40)"),
        ({"stack": 8}, "stack: got 8 bytes; allowed: 0 (before: 0)"),
        ({"shared": 2048}, "shared: got 2048 bytes; allowed: 1280 (before: 1024)"),
        ({"instructions": 501}, "instructions: got 501; allowed: 500 (before: 400)"),
        ({"load": 4}, "widest load: got 4 bytes; allowed: 16, as before"),
        ({"problem": "does not compile"}, "does not compile"),
        ({"kernel": "another"}, None),
    ],
)
def test_a_kernel_that_got_worse_is_one_sentence(change: dict[str, Any], sentence: str | None) -> None:
    """Only the launch that changed is reported, where a kernel is launched twice."""
    rows = verdict.fingerprints([PRINT, PRINT], [{**PRINT, **change}, PRINT])
    found = [sentence for row in rows for sentence in row["regressions"]]
    assert found == ([f"rope / llama / float16 / k / sm_90 / 0: {sentence}"] if sentence else [])


def test_a_revision_that_counts_no_instructions_is_compared_by_the_rest() -> None:
    older = {key: value for key, value in PRINT.items() if key != "instructions"}
    for base, head in ((older, PRINT), (PRINT, older)):
        assert [row["regressions"] for row in verdict.fingerprints([base], [head])] == [[]]


def mutant(verdict: str, line: int = 3, new: str = "<=") -> dict[str, Any]:
    diff = f"@@ -{line},1 +{line},1 @@\n-a < b\n+a {new} b"
    killed_by = [["value", "float32", "rows=1", "gate G1"]] if verdict == "killed" else []
    return {
        "op": "rope", "mutant": f"rope.py:{line}:compare:0", "kind": "compare", "verdict": verdict, "diff": diff,
        "killed_by": killed_by,
    }  # fmt: skip


def test_mutants_are_compared_whatever_their_line() -> None:
    """Only a mutant that was killed in the base can be a regression; those of new code are counted."""
    base = [mutant("killed"), mutant("survived", new="!="), mutant("killed", new="=="), mutant("same bits", new=">")]
    head = [
        mutant("survived", 9),
        mutant("raised", 9, "!="),
        mutant("equivalent", 9, "=="),
        mutant("unreached", 9, "+"),
    ]
    rows, note = verdict.mutants(base, head)
    assert [row["verdict"] for row in rows] == ["regressed", "improved", "same", "new"]
    assert [sentence for row in rows for sentence in row["regressions"]] == [
        "rope / rope.py:9:compare:0: survived now; value / float32 killed it before"
    ]
    assert note == "mutants killed: 2 of 3 of the base, 1 of 3 of the head; 1 faults are new, of which 1 survive"


HERE = Path.cwd()
BASE, HEAD = (Checkout(*side, HERE, HERE, HERE) for side in (("base", "abc"), ("head", "working tree")))
ROW = {
    "op": "rope", "shape": "llama", "dtype": "bfloat16", "backend": "mine", "forward": [1, 1, 1], "full": [2, 2, 2],
    "device_forward": None, "device_full": None, "peak_mebibytes": 9.0, "error_use": 0.1, "roofline": {}, "wrong": None,
}  # fmt: skip
RIGHT = {**check(coverage=0.5), "dtype": "bfloat16"}
META = {"versions": {"torch": "2.11"}, "gpu": "Fake card", "backend": "mine"}


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """What the verbs of the sides return, by side and verb; Unavailable is raised."""
    found: dict[tuple[str, str], Any] = {}

    def verb(checkout: Checkout, words: Sequence[str]) -> Any:
        results = found[checkout.name, words[0]]
        if isinstance(results, Unavailable):
            raise results
        return {**META}, results

    monkeypatch.setattr(job, "verb", verb)
    monkeypatch.setattr(Checkout, "demand_own", lambda *_: None)
    return found


class DeadSide:
    """A process that ends when it is asked for the first time."""

    def __init__(self, checkout: Checkout) -> None:
        self._side = checkout.name

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        if self._side == "base":
            return {"meta": {}}
        raise Unavailable(self._side, "it ended")

    def close(self) -> None:
        pass


def test_a_head_that_cannot_be_judged_compiled_or_timed_fails(
    verbs: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the base cannot do is a note; what neither can do is an error."""
    monkeypatch.setattr(job, "Side", DeadSide)
    verbs |= {("base", "run"): [RIGHT], ("head", "run"): [RIGHT]}
    verbs |= {("base", "fingerprint"): [PRINT], ("head", "fingerprint"): Unavailable("head", "does not compile")}
    report = job.against_base(BASE, HEAD, Request(["rope"], "mine", "cuda"))
    assert report.sentences == ["head: does not compile", "head: it ended"]
    verbs["base", "fingerprint"] = Unavailable("base", "has no such verb")
    report = job.against_base(BASE, HEAD, Request(["rope"], "mine", "cpu"))
    assert (report.regressions, report.notes) == ([], ["base: has no such verb", "head: does not compile"])
    verbs["head", "run"] = Unavailable("head", "cannot be imported")
    report = job.against_base(BASE, HEAD, Request(["rope"], "mine", "cpu"))
    assert (report.regressions, report.rows, report.meta) == (["head: cannot be imported"], [], META)
    assert text(report) == "FAIL head: cannot be imported\n1 regression; nothing was compared"
    verbs["base", "run"] = Unavailable("base", "cannot be imported")
    with pytest.raises(Unavailable, match="head: cannot be imported"):
        job.against_base(BASE, HEAD, Request(["rope"], "mine", "cpu"))


def test_a_backend_that_was_renamed_is_asked_for_by_its_name_on_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every verb, in the demand for its own checkout, and in the processes that time it."""
    asked: list[tuple[str, str, str]] = []

    class Recorded(DeadSide):
        def ask(self, do: str, **command: Any) -> dict[str, Any]:
            asked.append((self._side, "time", command["backend"]))
            return {"meta": {}} if self._side == "base" else super().ask(do, **command)

    def verb(checkout: Checkout, words: Sequence[str]) -> Any:
        asked.append((checkout.name, words[0], words[words.index("--backend") + 1]))
        return META, {"run": [RIGHT], "fingerprint": [PRINT], "mutate": [mutant("killed")]}[words[0]]

    monkeypatch.setattr(job, "verb", verb)
    monkeypatch.setattr(job, "Side", Recorded)
    monkeypatch.setattr(Checkout, "demand_own", lambda self, name: asked.append((self.name, "own", name)))
    job.against_base(BASE, HEAD, Request(["rope"], "new", "cuda", mutants=1, base_backend="old"))
    names = {"base": "old", "head": "new"}
    assert {(side, what) for side, what, _ in asked} == {
        (side, what) for side in names for what in ("own", "run", "fingerprint", "mutate", "time")
    }
    assert all(name == names[side] for side, _, name in asked)


def test_mutants_are_planted_in_what_is_right_on_both_sides(
    verbs: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs |= {(side, "run"): [RIGHT] for side in ("base", "head")}
    verbs |= {("base", "mutate"): [mutant("killed")], ("head", "mutate"): [mutant("survived")]}
    judge = ("--profile", "dev", "--deviations", "x.toml", "--property", "value")
    request = Request([], "mine", "cpu", judge, targets=(), mutants=4)
    report = job.against_base(BASE, HEAD, request)
    assert report.regressions == ["rope / rope.py:3:compare:0: survived now; value / float32 killed it before"]
    assert report.notes == ["mutants killed: 1 of 1 of the base, 0 of 1 of the head"]
    words = ["--backend", "mine", "--device", "cpu", "--sample", "4", "--dtype", "float32", "--profile", "dev"]
    assert request.mutate(["rope"]) == ["mutate", "rope", *words, "--property", "value"]
    verbs["base", "mutate"] = Unavailable("base", "has no mutants")
    report = job.against_base(BASE, HEAD, request)
    assert (report.regressions, report.notes) == ([], ["base: has no mutants"])
    cheap = Request([], "mine", "cpu", mutants=4).mutate(["rope"])
    assert "value" in cheap and "int64_offsets" not in cheap


def test_without_a_base_the_ledger_is_compared(verbs: dict[tuple[str, str], Any]) -> None:
    """The ledger's checks, kernels and times are compared; an operation that is gone is lost."""
    verbs |= {("head", "run"): [RIGHT], ("head", "fingerprint"): [PRINT], ("head", "bench"): [ROW]}
    recorded = Ledger("Fake card")
    assert recorded.update(results_of(META, [RIGHT, PRINT, ROW])) == (3, [])
    request = Request([], "mine", "cuda")
    report = job.against_ledger(HEAD, request, recorded)
    assert (report.regressions, [row["kind"] for row in report.rows]) == ([], ["property", "fingerprint", "time"])
    verbs["head", "bench"] = [{**ROW, "full": [3, 3, 3]}]
    verbs["head", "fingerprint"] = [{**PRINT, "stack": 16}]
    report = job.against_ledger(HEAD, request, recorded)
    assert [sentence.partition(": ")[2] for sentence in report.regressions] == [
        "stack: got 16 bytes; allowed: 0 (before: 0)",
        "full: got 3.0000 ms; allowed: 2.1218 (the ledger 2.0000)",
    ]
    verbs["head", "run"] = [RIGHT, {**RIGHT, "property": "gradients", "verdict": "fail", "message": "gate G1"}]
    report = job.against_ledger(HEAD, request, recorded)
    assert "note: rope / gradients / bfloat16: fails; the ledger does not record it\n" in text(report)
    verbs["head", "run"] = [{**RIGHT, "op": "geglu"}]
    verbs |= {("head", "fingerprint"): [], ("head", "bench"): []}
    assert job.against_ledger(HEAD, request, recorded).regressions == ["rope: is lost: the ledger has it"]
