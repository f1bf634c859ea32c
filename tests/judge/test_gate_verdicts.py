"""What the gate calls worse, in one sentence each, and that only what is right has a speed: on a fake card."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conformance import backends
from conformance.bench.card import Rates
from conformance.gate import job, side, verdict
from conformance.gate.job import Report, Request, compare_times
from conformance.gate.ledger import Ledger, results_of
from conformance.gate.side import Server
from conformance.gate.sides import Checkout, Unavailable
from conformance.gate.statistics import SIDES
from conformance.operations import PROJECT
from conformance.spec import Spec
from conformance.specs import specs
from conformance.verbs.gate import text
from tests.judge.fake_card import RATES, STATE, FakeCard
from unsloth_ref import kernels as reference


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
def test_checks(base: Any, head: Any, sentence: str | None, found: str) -> None:
    sentences = [f"rope / value / float32: {sentence}"] if sentence else []
    assert verdict.property_change(base, head) == (sentences, found)


def test_a_lost_operation_is_one_sentence() -> None:
    rows = verdict.properties([check("rope"), check("rope", "layouts"), check("geglu")], [check("geglu")])
    assert [row["regressions"] for row in rows if row["regressions"]] == [["rope: is lost: it was defined before"]]


def test_coverage_that_falls_is_one_sentence() -> None:
    """It is compared over the checks of both sides: a new property that covers little is no fall."""
    base = [check(coverage=0.8), check(name="layouts", coverage=0.6)]
    head = [check(coverage=0.5), check(name="layouts", coverage=0.6), check(name="new", coverage=0.01)]
    found = [sentence for row in verdict.properties(base, head) for sentence in row["regressions"]]
    assert found == ["rope / float32: mean coverage: got 55 %; allowed: 65 % (before: 70 %)"]
    assert not any(row["regressions"] for row in verdict.properties(base[1:], head[1:]))


PRINT = {
    "op": "rope", "shape": "llama", "dtype": "float16", "kernel": "k", "target": "sm_90", "registers": 40, "stack": 0,
    "shared": 1024, "load": 16, "store": 16, "problem": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"registers": 50}, None),
        ({"registers": 51}, "registers: got 51; allowed: 50 (before: 40)"),
        ({"stack": 8}, "stack: got 8 bytes; allowed: 0 (before: 0)"),
        ({"shared": 2048}, "shared: got 2048 bytes; allowed: 1280 (before: 1024)"),
        ({"load": 4}, "widest load: got 4 bytes; allowed: 16, as before"),
        ({"problem": "does not compile"}, "does not compile"),
        ({"kernel": "another"}, None),
    ],
)
def test_fingerprints(change: dict[str, Any], sentence: str | None) -> None:
    """The first of two launches of the same kernel changes, the second does not."""
    rows = verdict.fingerprints([PRINT, PRINT], [{**PRINT, **change}, PRINT])
    found = [sentence for row in rows for sentence in row["regressions"]]
    assert found == ([f"rope / llama / float16 / k / sm_90 / 0: {sentence}"] if sentence else [])


def right(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up)


def wrong(gate: Tensor, up: Tensor) -> Tensor:
    return 1.1 * reference.swiglu(gate, up)


class WrongLater:
    """Right while it is judged, wrong in the rounds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls += 1
        return (right if self.calls < 15 else wrong)(gate, up)


class Card(FakeCard):
    """A fake card with peak rates, and a little noise: two values in turn."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__(milliseconds)
        self.calls = 0

    def rates(self) -> Rates:
        return RATES

    def state(self) -> dict[str, Any]:
        return STATE

    def time_alone(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.calls += 1
        return self.milliseconds * (1 + 1e-3 * (self.calls % 3)), call()

    time_queued = time_alone


class LocalSide:
    """A side in this process."""

    def __init__(self, milliseconds: float, function: Any, load: Callable[[Any], None]) -> None:
        self._server = Server(lambda: Card(milliseconds))  # type: ignore[arg-type, return-value]
        self._function, self._load = function, load
        self._answers: list[dict[str, Any]] = []

    def tell(self, do: str, **command: Any) -> None:
        self._load(self._function)
        answer = self._server.answer(do, **json.loads(json.dumps(command)))
        self._answers.append(json.loads(json.dumps(answer, allow_nan=False)))

    def hear(self) -> dict[str, Any]:
        return self._answers.pop(0)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.tell(do, **command)
        return self.hear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Report]]:
    """Compare the times of a base and a head, each milliseconds and a function, on one small shape of swiglu."""
    swiglu: Spec = specs()["swiglu"]
    small = replace(swiglu, speed=replace(swiglu.speed, shapes={"small": {"rows": 4, "hidden": 64}}))
    monkeypatch.setattr("conformance.bench.measure.specs", lambda: {"swiglu": small})
    current: list[Any] = [right]

    def load(name: str, device: str, source: Any) -> backends.Judged:
        return backends.Judged(name, {"swiglu": current[0]}, name)

    monkeypatch.setattr(backends, "load", load)

    def compare(base: tuple[float, Any], head: tuple[float, Any]) -> Report:
        def use(function: Any) -> None:
            current[0] = function

        report = Report()

        def start() -> AbstractContextManager[Mapping[str, LocalSide]]:
            return nullcontext({name: LocalSide(*(head if name == "head" else base), use) for name in SIDES})

        request = Request(["swiglu"], "mine", "cuda", dtypes=("float32",))
        compare_times(start, request, [("swiglu", "float32")], report)
        return report

    yield compare


def test_a_slower_head_fails_and_a_faster_one_is_a_record(timed: Callable[..., Report]) -> None:
    slower = timed((10.0, right), (10.5, right))
    assert slower.rows[0]["verdict"] == "SLOWER"
    assert len(slower.regressions) == 4  # one per kind of time
    assert slower.regressions[0].startswith("swiglu / small 4x64 / float32: forward: SLOWER: 1.050 [1.0")
    assert slower.meta["copy_bytes_per_second"] == RATES.copy
    faster = timed((10.0, right), (9.0, right))
    assert (faster.rows[0]["verdict"], faster.regressions) == ("FASTER", [])
    assert {one["rounds"] for one in faster.rows[0]["times"].values()} == {40}  # 20 in each of two sets of processes
    assert faster.rows[0]["head"]["device_full"][1] == pytest.approx(4.5, rel=0.01)  # two sets in each graph
    assert "better than the base: 1; record it" in text(faster)


def test_the_same_is_the_same(timed: Callable[..., Report]) -> None:
    report = timed((10.0, right), (10.0, right))
    assert (report.rows[0]["verdict"], report.regressions) == ("SAME", [])
    assert {one["rounds"] for one in report.rows[0]["times"].values()} == {20}


@pytest.mark.parametrize("function", [wrong, WrongLater()])
def test_what_is_not_right_has_no_speed(function: Any, timed: Callable[..., Report]) -> None:
    """Neither before the rounds nor after them."""
    report = timed((10.0, right), (1.0, function))
    (row,) = report.rows
    assert (row["verdict"], row["times"]) == (None, {})
    assert row["head"]["full"] is None
    (sentence,) = report.regressions
    assert sentence.startswith("swiglu / small 4x64 / float32: wrong, and has no speed: ")
    assert "no speed: the head: " in text(report)


def test_a_wrong_base_gives_no_ratio(timed: Callable[..., Report]) -> None:
    report = timed((1.0, wrong), (10.0, right))
    assert (report.rows[0]["verdict"], report.rows[0]["times"], report.regressions) == (None, {}, [])


@pytest.fixture
def standard_output() -> Iterator[None]:
    """Restores what file descriptor 1 is."""
    saved = os.dup(1)
    yield
    os.dup2(saved, 1)
    os.close(saved)


@pytest.mark.usefixtures("standard_output")
def test_a_process_answers_line_by_line(
    timed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a backend prints does not get between the answers."""

    def talkative(gate: Tensor, up: Tensor) -> Tensor:
        os.write(1, b"hello\n")
        return right(gate, up)

    judged = backends.Judged("mine", {"swiglu": talkative}, "mine")
    monkeypatch.setattr(backends, "load", lambda *_: judged)
    commands: list[dict[str, Any]] = [
        {"do": "start", "backend": "mine", "source": asdict(PROJECT)},
        {"do": "shapes", "op": "swiglu"},
        {"do": "shapes", "op": "rope"},
        {"do": "prepare", "op": "swiglu", "shape": "small", "dtype": "float32"},
        {"do": "sample", "kind": "full", "count": 20},
        {"do": "finish"},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, commands))))
    side.main(lambda: Card(2.0))  # type: ignore[arg-type, return-value]
    printed = capfd.readouterr()
    start, shapes, none, ready, sample, finish = map(json.loads, printed.out.splitlines())
    assert start["meta"]["gpu"] == "Fake card"
    assert (shapes, none) == ({"shapes": ["small"]}, {"shapes": []})
    assert (sorted(ready["kinds"]), ready["red"]) == (["device_forward", "device_full", "forward", "full"], None)
    assert len(sample["milliseconds"]) == 20
    assert finish["row"]["full"][1] == pytest.approx(2.0, rel=0.01)
    assert "hello" in printed.err


def test_a_side_takes_commands_in_order() -> None:
    with pytest.raises(ValueError, match="do: got 'sample'; allowed: start"):
        side.Server(side.Card).answer("sample", kind="full", count=1)


HERE = Path.cwd()
BASE, HEAD = Checkout("base", "abc", HERE, HERE), Checkout("head", "working tree", HERE, HERE)
ROW = {
    "op": "rope", "shape": "llama", "dtype": "bfloat16", "backend": "mine", "forward": [1, 1, 1], "full": [2, 2, 2],
    "device_forward": None, "device_full": None, "peak_mebibytes": 9.0, "error_use": 0.1, "roofline": {}, "red": None,
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
    assert report.regressions == ["head: cannot be imported", "rope: is lost: it was defined before"]
    verbs["base", "run"] = Unavailable("base", "cannot be imported")
    with pytest.raises(Unavailable, match="head: cannot be imported"):
        job.against_base(BASE, HEAD, Request(["rope"], "mine", "cpu"))


def test_without_a_base_the_ledger_is_compared(verbs: dict[tuple[str, str], Any]) -> None:
    """Checks, kernels and times; an operation that is no longer there is lost."""
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
    verbs["head", "run"] = [{**RIGHT, "op": "geglu"}]
    verbs |= {("head", "fingerprint"): [], ("head", "bench"): []}
    assert job.against_ledger(HEAD, request, recorded).regressions == ["rope: is lost: the ledger has it"]
