"""The bench, on a card that is played: what is timed, checked and shown, without a GPU."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unsloth_ref.kernels
from conformance import backends, cli
from conformance.bench import conftest
from conformance.bench.card import Card, Rates
from conformance.bench.contender import Contender
from conformance.bench.measure import Bench, bench_case
from conformance.bench.replay import ReplayTimer
from conformance.bench.sampler import FEWEST_ROUNDS, MOST_ROUNDS, Times, interleave
from conformance.bench.table import COLUMNS, NAME_WIDTH, Row, heading, text, write_json
from conformance.case import Case
from conformance.peers import Absent, kernels
from conformance.spec import Spec, specs
from conformance.trial import Trial

ROOT = Path(__file__).parents[2]
RATES = Rates(copy=4e12, matmul=7e14)
STATE = {"driver": "1.2", "sm_clock_mhz": 1980}
SHAPE = {"rows": 4, "hidden": 64}


class Played:
    """A card whose calls take what the test says, and whose graphs call again."""

    device = "cpu"
    name = "Played"
    cache_bytes = 0

    def __init__(self, milliseconds: float = 1.0, graphs: bool = True) -> None:
        self.milliseconds, self.graphs = milliseconds, graphs

    def host(self, call: Callable[[], Any]) -> tuple[float, Any]:
        return self.milliseconds, call()

    queued = host

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], Any], Any] | str:
        if not self.graphs:
            return "it waits"
        found = body()

        def replay() -> None:
            for old, new in zip(flat(found), flat(body()), strict=True):
                old.detach().copy_(new.detach())

        return replay, found

    def peak_mebibytes(self, call: Callable[[], Any]) -> float:
        call()
        return 3.0

    def tidy(self) -> None:
        pass


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for part in found for tensor in flat(part)]


def right(gate: Tensor, up: Tensor) -> Tensor:
    return unsloth_ref.kernels.swiglu(gate, up)


def wrong(gate: Tensor, up: Tensor) -> Tensor:
    return 1.1 * unsloth_ref.kernels.swiglu(gate, up)


class Tired:
    """Right while it is judged, wrong later, as a race or a cached result would be."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls -= 1
        return right(gate, up) if self.calls > 0 else wrong(gate, up)


class OverGate(torch.autograd.Function):
    """Right, but the gradient of gate is written over gate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return right(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            dgate, dup = torch.autograd.grad(right(gate, up), (gate, up), *grad_outputs)
        ctx.saved_tensors[0].data.copy_(dgate)
        return dgate, dup


def over_gate(gate: Tensor, up: Tensor) -> Tensor:
    return OverGate.apply(gate, up)  # type: ignore[no-any-return]


def cannot(gate: Tensor, up: Tensor) -> Tensor:
    raise NotImplementedError("no such thing")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    """Rows by backend of swiglu on one small shape; `liger` stands for other people's."""
    spec = replace(specs()["swiglu"], bench={"small": SHAPE})

    def rows(card: Any, **functions: Callable[..., Any]) -> dict[str, Row]:
        def load(name: str, device: str) -> backends.Judged:
            return backends.Judged(name, {"swiglu": functions[name]}, name, False)

        monkeypatch.setattr("conformance.bench.measure.specs", lambda: {"swiglu": spec})
        monkeypatch.setattr(backends, "load", load)
        return {row.backend: row for row in Bench(card, RATES, list(functions), "float32").rows("swiglu", "small")}

    return rows


def test_a_right_kernel_is_timed(measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(Played(milliseconds=2.0), fast=right)["fast"]
    assert (row.red, row.note, row.failed) == (None, None, False)
    assert row.shape == "small 4x64"
    assert row.forward == row.full == (2.0, 2.0, 2.0)
    assert row.device_forward == row.device_full == (1.0, 1.0, 1.0)  # two sets in each graph
    assert row.device_backward == 0.0
    assert row.peak_mebibytes == 3.0
    moved = 4 * 64 * 4
    assert row.roofline["forward"] == pytest.approx(3 * moved / 4e12 / 2e-3)
    assert row.roofline["full"] == pytest.approx(8 * moved / 4e12 / 2e-3)
    assert row.roofline["device_forward"] == pytest.approx(3 * moved / 4e12 / 1e-3)
    assert set(row.samples) == {"forward", "full", "device_forward", "device_full"}


@pytest.mark.parametrize("function", [wrong, over_gate, cannot])
def test_no_speed_of_ours_where_it_is_red(function: Callable[..., Any], measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(Played(), fast=function)["fast"]
    assert row.red is not None
    assert row.failed
    assert row.forward is row.full is row.device_forward is row.device_full is row.peak_mebibytes is None
    assert row.roofline == {}


def test_a_peer_is_timed_as_it_is(measure: Callable[..., dict[str, Row]]) -> None:
    red = measure(Played(), liger=wrong)["liger"]
    assert red.red is not None and red.red.startswith("gate G1")
    assert (red.full, red.failed) == ((1.0, 1.0, 1.0), False)
    in_place = measure(Played(), liger=over_gate)["liger"]
    assert (in_place.red, in_place.note, in_place.full) == (None, "writes over gate", (1.0, 1.0, 1.0))
    absent = measure(Played(), liger=cannot)["liger"]
    assert (absent.full, absent.failed) == (None, False)
    assert absent.red == "raised NotImplementedError: no such thing"


@pytest.mark.parametrize(
    ("calls", "what"), [(10, "last timed forward"), (2 + 3 + 1 + 2 * MOST_ROUNDS + 30, "replayed")]
)
def test_the_last_timed_result_is_checked(
    calls: int, what: str, measure: Callable[..., dict[str, Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.bench.sampler.FEWEST_ROUNDS", MOST_ROUNDS)
    row = measure(Played(), fast=Tired(calls))["fast"]
    assert row.red is not None and row.red.startswith(f"{what}: gate G1")
    assert row.full is None
    assert row.failed


def test_a_replay_that_writes_nothing_is_seen(measure: Callable[..., dict[str, Row]]) -> None:
    class Idle(Played):
        def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
            return (lambda: None), body()

    row = measure(Idle(), fast=right)["fast"]
    assert row.red is not None and row.red.startswith("replayed: ")


@pytest.mark.parametrize("name", ["fast", "liger"])
def test_a_time_above_the_roofline_is_an_error(name: str, measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(Played(milliseconds=1e-7), **{name: right})[name]
    assert row.red is not None and row.red.endswith("of the roofline: not all the work was done")
    assert row.full is row.device_full is row.peak_mebibytes is None
    assert row.failed


def test_what_one_call_leaves_in_the_cache_is_granted(measure: Callable[..., dict[str, Row]]) -> None:
    """In a graph it is not: there each call writes back what the one before left."""
    card = Played(milliseconds=1e-7)
    card.cache_bytes = 2**20
    assert "device" in (measure(card, fast=right)["fast"].red or "")


def test_without_a_graph_there_is_no_device_time(measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(Played(graphs=False), liger=right)["liger"]
    assert row.device_full is row.device_backward is None
    assert row.full == (1.0, 1.0, 1.0)
    assert row.note == "no CUDA graph (it waits)"
    assert not row.failed


def test_rounds_take_turns_and_begin_with_another() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleave(calls, lambda call: (1.0, call()), seconds=0.0)
    assert all(len(times.samples) == FEWEST_ROUNDS for times, _ in found.values())
    assert "".join(order[3:12]) == "abcbcacab"  # after a first round that is not counted
    assert interleave({}, lambda call: (1.0, call())) == {}


def test_quantiles() -> None:
    times = Times(tuple(float(sample) for sample in range(101)))
    assert times.spread == (20.0, 50.0, 80.0)
    assert times.median == 50.0


def test_a_shape_may_name_options() -> None:
    spec = replace(specs()["cross_entropy"], bench={"gemma": {"tokens": 3, "vocab": 5, "softcap": 30.0}})
    case = bench_case(spec, "gemma")
    assert case == Case((("tokens", 3), ("vocab", 5)), options=(("softcap", 30.0),))


def small(spec: Spec) -> Spec:
    return replace(
        spec,
        bench={name: {k: min(v, 8) if k in spec.sizes else v for k, v in b.items()} for name, b in spec.bench.items()},
    )


@pytest.mark.parametrize("op", unsloth_ref.kernels.__all__)
def test_every_spec_can_be_timed(op: str) -> None:
    """Its shapes build, its bytes are counted, and the reference is right on them."""
    spec = small(specs()[op])
    for shape in spec.bench:
        case = bench_case(spec, shape)
        inputs = spec.inputs(case, torch.float32, "cpu")
        assert all(count > 0 for count in spec.bytes(inputs))
        trial = Trial(spec, spec.reference, torch.float32, "cpu")
        contender = Contender(trial, case, inputs, ours=True)
        contender.prepare(2)
        contender.check("again", *contender.full())
        contender.check("all of them", *contender.every_full()[-1])
        assert (contender.red, contender.note) == (None, None)


def on_gpu(test: Callable[..., None]) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@pytest.fixture(scope="module")
def card() -> Card:
    return Card()


@on_gpu
def test_a_graph_holds_what_does_not_wait(card: Card) -> None:
    x = torch.ones(2**20, device="cuda")
    assert "synchroniz" in str(card.capture(lambda: float(x.sum())))
    captured = card.capture(lambda: 2 * x)  # after a refusal, too
    assert not isinstance(captured, str)
    replay, found = captured
    x.fill_(3)
    replay()
    assert found.eq(6).all()
    milliseconds, result = card.queued(replay)
    assert 0 < milliseconds < 100
    assert result is None


@on_gpu
def test_a_card_measured(card: Card) -> None:
    """No card copies slower than 0.1 TB/s or faster than 100."""
    rates = card.rates()
    assert 1e11 < rates.copy < 1e14
    milliseconds, _ = card.host(lambda: torch.ones(1, device="cuda"))
    assert 0 < milliseconds < 100
    assert card.peak_mebibytes(lambda: torch.ones(2**20, device="cuda")) == pytest.approx(4, abs=0.1)
    clock = card.state()["sm_clock_mhz"]
    assert clock is None or 100 < clock < 5000


@on_gpu
@pytest.mark.parametrize("op", unsloth_ref.kernels.__all__)
def test_the_fast_kernels_on_a_card(op: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specs()[op]
    spec = replace(
        spec,
        bench={"s": {k: min(v, 256) if k in spec.sizes else v for k, v in next(iter(spec.bench.values())).items()}},
    )
    monkeypatch.setattr("conformance.bench.measure.specs", lambda: {op: spec})
    unlimited = Rates(1e18, 1e18, 1e18)  # what is this small lies in the cache
    rows = {row.backend: row for row in Bench(card, unlimited, ["fast", "reference"], "bfloat16").rows(op, "s")}
    for row in rows.values():
        assert (row.red, row.note, row.failed) == (None, None, False)
        assert set(row.samples) == {"forward", "full", "device_forward", "device_full"}


FAST = Row(
    op="swiglu",
    shape="small 4x64",
    dtype="bfloat16",
    backend="fast",
    forward=(0.1, 0.2, 0.3),
    full=(0.4, 0.5, 0.6),
    device_forward=(0.1, 0.15, 0.2),
    device_full=(0.3, 0.35, 0.4),
    device_backward=0.2,
    peak_mebibytes=12.0,
    error_use=0.31,
    roofline={"forward": 0.5, "full": 0.55, "device_forward": 0.92, "device_backward": 0.86},
)
ROWS = [
    FAST,
    replace(FAST, backend="liger", device_full=None, device_backward=None, red="gate G1", note="writes over gate"),
    Row("swiglu", "small 4x64", "bfloat16", "reference", red="gate G2 used 3", failed=True),
]


def test_the_table() -> None:
    head, fast, liger, reference = text(ROWS).split("\n")
    assert head.split("  ")[0] == "swiglu small 4x64 bfloat16"
    shown = "fast 0.200 [0.100 0.300] 0.500 [0.400 0.600] 55 % 0.150 92 % 0.200 86 % 12 31 %"
    assert " ".join(fast.split()) == shown
    shown = "liger 0.200 [0.100 0.300] 0.500 [0.400 0.600] 55 % 0.150 92 % - 12 red gate G1; writes over gate"
    assert " ".join(liger.split()) == shown
    assert reference.split(None, 1) == ["reference", "not timed: gate G2 used 3"]
    start = NAME_WIDTH
    for name, width in COLUMNS:
        assert head[start:].startswith(name)
        assert fast[start - 1] == " " != fast[start]
        start += width
    assert max(map(len, (head, fast))) < 170


def test_the_heading_names_the_card_and_its_rates() -> None:
    line = heading(Played(), RATES, STATE)  # type: ignore[arg-type]
    assert line.startswith("Played, copy 4.00 TB/s, bf16 matmul 700 TFLOP/s, SM clock 1980 MHz\n")
    assert "SM clock" not in heading(Played(), RATES, {"driver": None, "sm_clock_mhz": None})  # type: ignore[arg-type]


def test_what_is_written_for_machines(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    write_json(file, ROWS, Played(), RATES, STATE, {"liger": "it is absent"})  # type: ignore[arg-type]
    written = json.loads(file.read_text())
    assert {"versions", "gpu", "driver", "sm_clock_mhz", "copy_bytes_per_second", "absent", "commit"} <= set(
        written["meta"]
    )
    assert written["meta"]["gpu"] == "Played"
    fast = written["results"][0]
    assert fast["device_full"] == [0.3, 0.35, 0.4]
    assert fast["roofline"]["device_forward"] == 0.92
    assert "samples" not in fast


def test_an_absent_peer_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, device: str) -> None:
        if name == "liger":
            raise Absent("backend: liger needs the package liger-kernel, which is not installed")

    monkeypatch.setattr(backends, "load", load)
    line = "conformance: backend: liger needs the package liger-kernel, which is not installed"
    assert cli._present(["fast", "liger", "fast"], "cpu")[0] == ["fast"]
    assert capsys.readouterr().err == f"{line}: left out\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "Card", Played)
    assert cli.main(["bench", "--backend", "liger"]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(Absent, match="needs the package no-such-package, which is not installed"):
        kernels("no-such-package", "no_such_package:thing")
    with pytest.raises(Absent, match="has its package rich, but rich:no_such_thing cannot be imported"):
        kernels("rich", "rich:no_such_thing")
    there, missing = kernels("rich", "rich:get_console", "rich:no_such_thing")
    assert callable(there)
    for use in (lambda: missing.apply(1), lambda: missing(1)):
        with pytest.raises(ImportError, match="rich:no_such_thing cannot be imported"):
            use()


def test_importing_a_peer_leaves_the_compiler_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it prints is no part of a table."""
    code = "import torch._inductor.config as c; c.dce = not c.dce; print('hello')\ndef thing(): return c.dce"
    (tmp_path / "meddling_peer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    before = torch._inductor.config.dce
    (thing,) = kernels("meddling-peer", "meddling_peer:thing")
    assert thing() == torch._inductor.config.dce == before
    assert capsys.readouterr() == ("", "hello\n")


def test_stored_times_name_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a baseline of one card would silently be compared with a run of another."""
    monkeypatch.setattr(conftest, "the_card", lambda: (Played(), RATES, STATE))
    info: dict[str, Any] = {}
    conftest.pytest_benchmark_update_machine_info(None, info)  # type: ignore[arg-type]
    assert {"torch", "triton", "cuda"} <= set(info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    conftest.pytest_benchmark_update_machine_info(None, info)  # type: ignore[arg-type]
    assert info["gpu"] == "Played"
    assert info["driver"] == "1.2"
    assert "sm_clock_mhz" not in info  # another in every run, and each difference is a warning


STORED = """
import pytest
from conformance.bench.replay import ReplayTimer
from conformance.bench.sampler import Times

TIMER = ReplayTimer()


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("scale", [1, 2])
def test_played(benchmark, scale):
    TIMER.play(benchmark, Times(tuple(scale * (0.1 + 0.01 * n) for n in range(21))))
"""


def test_pytest_benchmark_stores_the_samples(tmp_path: Path) -> None:
    """Its statistics are those of the milliseconds played."""
    (tmp_path / "test_stored.py").write_text(STORED)
    python = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*python, "-c", "/dev/null", "--benchmark-json=out.json", "test_stored.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, textwrap.indent(done.stdout + done.stderr, "  ")
    stats = [benchmark["stats"] for benchmark in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert [s["rounds"] for s in stats] == [21, 21]
    assert [s["median"] for s in stats] == [pytest.approx(0.2e-3), pytest.approx(0.4e-3)]
    assert [s["min"] for s in stats] == [pytest.approx(0.1e-3), pytest.approx(0.2e-3)]


def test_the_replay_timer_runs_from_sample_to_sample() -> None:
    timer = ReplayTimer()
    assert timer() == timer() == 0.0  # nothing loaded
