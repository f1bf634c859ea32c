"""Times of two sides on a fake card: what is slower fails, what changed is timed again, what is not right has none."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import pytest
from torch import Tensor

from conformance import backends
from conformance.bench.card import Rates
from conformance.gate import side
from conformance.gate.job import Report, Request, compare_times
from conformance.gate.side import Server
from conformance.gate.sides import Unavailable
from conformance.gate.statistics import SIDES
from conformance.operations import PROJECT
from conformance.spec import Spec
from conformance.specs import specs
from conformance.verbs.gate import text
from tests.judge.fake_card import RATES, STATE, FakeCard
from unsloth_ref import kernels as reference


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

    def send(self, do: str, **command: Any) -> None:
        self._load(self._function)
        answer = self._server.answer(do, **json.loads(json.dumps(command)))
        self._answers.append(json.loads(json.dumps(answer, allow_nan=False)))

    def receive(self) -> dict[str, Any]:
        return self._answers.pop(0)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.send(do, **command)
        return self.receive()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
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

    return compare


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


class OtherSchema:
    """A side that has started, whose results have a schema of their own."""

    def __init__(self, schema: int) -> None:
        self._schema = schema

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        return {"meta": {"schema": self._schema}}


def test_a_base_whose_results_have_another_schema_is_not_timed() -> None:
    sides: Any = {name: OtherSchema(2 if name == "head" else 1) for name in SIDES}
    request = Request(["swiglu"], "mine", "cuda")
    with pytest.raises(Unavailable, match=r"^base: its results have schema 1, those of the head 2: no times"):
        compare_times(lambda: nullcontext(sides), request, [("swiglu", "float32")], Report())


def test_the_same_is_the_same(timed: Callable[..., Report]) -> None:
    report = timed((10.0, right), (10.0, right))
    assert (report.rows[0]["verdict"], report.regressions) == ("SAME", [])
    assert {one["rounds"] for one in report.rows[0]["times"].values()} == {20}


@pytest.mark.parametrize("function", [wrong, WrongLater()])
def test_what_is_not_right_has_no_speed(function: Any, timed: Callable[..., Report]) -> None:
    """A kernel that is wrong before the rounds or after them has no times."""
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
    assert (sorted(ready["kinds"]), ready["wrong"]) == (["device_forward", "device_full", "forward", "full"], None)
    assert min(ready["kinds"].values()) >= 2.0  # of a whole replay, which decides how many make a sample
    assert len(sample["milliseconds"]) == 20
    assert finish["row"]["full"][1] == pytest.approx(2.0, rel=0.01)
    assert "hello" in printed.err


def test_a_side_takes_commands_in_order() -> None:
    with pytest.raises(ValueError, match="do: got 'sample'; allowed: start"):
        side.Server(side.Card).answer("sample", kind="full", count=1)
