"""Measuring how often a gate is wrong: planted slowdowns are as large as wanted, and the document counts verdicts."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bench.contender import Contender
from conformance.case import Case
from conformance.gate.sides import Unavailable
from conformance.gate.statistics import SIDES
from conformance.specs import specs
from conformance.trial import Trial
from tests.judge.power import gate, gate_document, planted
from unsloth_ref import kernels as reference

KINDS = {"forward": 0.2, "full": 0.6, "device_forward": 0.1, "device_full": 0.3}


class Clock:
    """Seconds that pass when something is asked."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakeSide:
    """A process whose device kinds of time are slower by a share; it recognises a wrong kernel."""

    def __init__(self, clock: Clock, seed: str, slower: float, dies: bool) -> None:
        self._clock, self._slower, self._dies = clock, slower, dies
        self._random = random.Random(seed)
        self._answers: list[dict[str, Any]] = []
        self.started = 0

    def send(self, do: str, **command: Any) -> None:
        self._clock.seconds += {"start": 4.0, "prepare": 0.2, "sample": 0.005}.get(do, 0.0)
        self._answers.append(getattr(self, f"_{do}")(**command))

    def receive(self) -> dict[str, Any]:
        return self._answers.pop(0)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.send(do, **command)
        return self.receive()

    def _start(self, **_: Any) -> dict[str, Any]:
        self.started += 1
        assert self.started == 1
        return {"meta": {"gpu": "Fake card", "versions": {"torch": "2", "triton": "3"}}}

    def _prepare(self, op: str, shape: str, dtype: str) -> dict[str, Any]:
        if self._dies and op == "rope":
            raise Unavailable("head", "it ended")
        self._wrong = "wrong" if self._slower and op == planted.WRONG else None
        self._about = {"op": op, "shape": shape, "dtype": dtype}
        return {"kinds": {} if self._wrong else KINDS, "wrong": self._wrong}

    def _sample(self, kind: str, count: int) -> dict[str, Any]:
        slower = 1 + self._slower * kind.startswith("device")
        return {"milliseconds": [slower * KINDS[kind] * math.exp(self._random.gauss(0, 0.002)) for _ in range(count)]}

    def _finish(self) -> dict[str, Any]:
        return {"row": {**self._about, "wrong": self._wrong, "peak_mebibytes": 1.0}}


def measured(path: Path, minutes: float, gates: int = 40, dies: bool = False) -> dict[str, Any]:
    clock = Clock()
    number = iter(range(1000))

    @contextmanager
    def start(share: float) -> Iterator[Mapping[str, FakeSide]]:
        seed = next(number)
        yield {name: FakeSide(clock, f"{seed}{name}", share * (name == "head"), dies) for name in SIDES}

    line = {"planted": 0.05, "op": "swiglu", "shape": [8, 8], "options": "{}", "forward": 0.049, "full": 0.051}
    gate.Measurement(start, 60 * minutes, path, lambda: [line], clock).run(gate.generations(gates))
    return json.loads(path.read_text())


def test_gates_with_known_verdicts_are_counted(tmp_path: Path) -> None:
    found = measured(tmp_path / "gates.json", minutes=30)
    heads = Counter((one["head"], one["verdict"]) for one in found["results"])
    assert heads == {("base", "SAME"): 32, ("0.05", "SLOWER"): 4, ("0.02", "SLOWER"): 4, ("wrong", None): 2}
    assert found["meta"]["sets_of_processes"] == 12  # two per generation with changes
    assert found["meta"]["seconds_of_starting"] == pytest.approx(12 * 12)
    wrong = next(one for one in found["results"] if one["head"] == "wrong")
    assert (wrong["times"], wrong["no_speed"]) == ({}, "the head: wrong")
    slower = next(one for one in found["results"] if one["head"] == "0.05")
    first, second = slower["differences"]
    assert sorted(first) == sorted(KINDS)
    assert sorted(second) == ["device_forward", "device_full"]
    assert first["device_full"]["head"] == pytest.approx(math.log(1.05), abs=0.002)
    assert abs(first["device_full"]["again"]) < 0.002
    document = gate_document.into(f"a\n{gate_document.BEGIN}\nold\n{gate_document.END}\nb\n", [found, found])
    assert "old" not in document
    assert "Fake card, torch 2, triton 3; 84 gates, 24 sets of three processes" in document
    assert "| base against base | 64 | 0 | 0 | 64 | 0 | 0 | 20 | - |" in document
    assert "| planted: 5 % slower | 8 | 8 | 0 | 0 | 0 | 0 |" in document
    assert "| 4.9 % to 5.1 % |" in document
    assert "| a wrong kernel | 4 | 0 | 0 | 0 | 0 | 4 | - | - |" in document
    assert "False changes: 0 of 64. With a confidence of 95 % their rate is below 4.6 %." in document
    assert "| device_full | 144 | 0.25 % | 0." in document  # 64 gates with two pairs, 16 with one
    assert document.startswith("a\n") and document.endswith("\nb\n")


def test_a_false_change_and_a_lost_process_are_shown(tmp_path: Path) -> None:
    found = measured(tmp_path / "gates.json", minutes=30, dies=True)
    lost = [one for one in found["results"] if one["lost"]]
    assert {one["op"] for one in lost} == {"rope"}
    assert lost[0]["no_speed"] == "head: it ended"
    found["results"][0]["verdict"] = "FASTER"
    about = " ".join((found["results"][0]["op"], found["results"][0]["shape"]))
    assert f": {about}. With" in gate_document.text([found])


def test_measuring_ends_with_the_time_and_every_head_has_gates(tmp_path: Path) -> None:
    found = measured(tmp_path / "gates.json", minutes=5, gates=4000)
    assert 4 * 60 < found["meta"]["seconds"] <= 5 * 60
    counts = Counter(one["head"] for one in found["results"])
    assert min(counts["0.05"], counts["0.02"]) > 5
    assert counts["base"] > 25


def test_files_of_two_cards_and_a_document_without_a_place_are_refused() -> None:
    metas = [{"gpu": name, "versions": {}} for name in ("a", "b")]
    with pytest.raises(ValueError, match="files: got different cards"):
        gate_document.text([{"meta": meta, "results": []} for meta in metas])
    with pytest.raises(ValueError, match="document: got no"):
        gate_document.into("text", [])


def test_the_document_states_what_the_committed_files_hold() -> None:
    docs = Path(__file__).parents[2] / "docs"
    files = sorted((docs / "results" / "power").glob("gates_*.json"))
    document = (docs / "gate.md").read_text(encoding="utf-8")
    again = f"python -m tests.judge.power write-gate {' '.join(path.name for path in files)}"
    assert gate_document.into(document, [json.loads(path.read_text()) for path in files]) == document, again


@pytest.mark.parametrize(("count", "found", "bound"), [(200, 0, 0.0149), (200, 1, 0.0235), (10, 10, 1.0)])
def test_the_bound_is_that_of_clopper_and_pearson(count: int, found: int, bound: float) -> None:
    assert gate_document.upper_bound(found, count) == pytest.approx(bound, abs=1e-4)


def test_every_shape_exists() -> None:
    assert all(shape in specs()[op].speed.shapes for op, shape in (*gate.QUICK, (planted.WRONG, "short")))


class FakeDevice:
    """Kernels take as long as a test says; a sleep costs time to launch, and its rate is not known."""

    def __init__(self) -> None:
        self.passed = 0.0

    def sleep(self, cycles: int) -> None:
        self.passed += cycles / 1.7e6 + 0.0015 if cycles else 0.0

    def timer(self, call: Callable[[], Any]) -> Callable[[], float]:
        return lambda: self.milliseconds(call)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        before = self.passed
        call()
        return self.passed - before

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """The reference; each pass takes 0.2 ms."""
        self.passed += 0.2
        return _TakesTime.apply(reference.swiglu(gate, up), self)


@pytest.mark.parametrize(("share", "measured"), [(0.05, 0.05), (0.02, 0.02), (0.001, 0.0075)])
def test_a_slowdown_is_as_large_as_wanted_or_as_a_launch(share: float, measured: float) -> None:
    device, found = FakeDevice(), []
    slowed = planted.Slowed("swiglu", device.swiglu, share, lambda *about: found.append(about), device)
    gates, up = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        slowed(gates, up)
    ((shape, options, shares),) = found
    assert (shape, options) == ((2, 8), {})
    assert (shares.forward, shares.full) == pytest.approx((measured, measured), rel=0.01)
    before = device.passed
    slowed(gates, up).sum().backward()
    assert device.passed - before == pytest.approx((0.2 + 0.2) * (1 + measured), rel=1e-3)
    assert len(found) == 1


def test_a_slowed_kernel_is_right_where_it_is_timed() -> None:
    spec, device = specs()["swiglu"], FakeDevice()
    slowed = planted.Slowed("swiglu", device.swiglu, 0.05, lambda *_: None, device)
    case = Case((("rows", 4), ("hidden", 64)))
    inputs = spec.inputs(case, torch.float32, "cpu")
    contender = Contender(Trial(spec, slowed, torch.float32, "cpu"), case, inputs, ours=True)
    assert (contender.failure, contender.cheat, contender.usable) == (None, None, True)
    contender.prepare(2)
    assert device.milliseconds(contender.every_forward) == pytest.approx(2 * 0.2 * 1.05, rel=1e-3)
    assert device.milliseconds(contender.every_full) == pytest.approx(2 * 0.4 * 1.05, rel=1e-3)
    contender.check_times()
    assert contender.failure is None


class _TakesTime(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, device: FakeDevice) -> Tensor:
        context.device = device
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        context.device.passed += 0.2
        return gradient, None
