"""The bench on a fake card: what it times, checks and compares with the roofline, without a GPU."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import unsloth_ref.kernels
from conformance import backends
from conformance.bench.card import Card, Rates
from conformance.bench.contender import Contender
from conformance.bench.measure import Bench, bench_case
from conformance.bench.sampler import FEWEST_ROUNDS, MOST_ROUNDS, Times, interleave
from conformance.bench.table import Row
from conformance.case import Case
from conformance.operations import Source
from conformance.spec import Spec
from conformance.specs import specs
from conformance.trial import Trial
from tests.judge.fake_card import RATES, FakeCard

SHAPE = {"rows": 4, "hidden": 64}


def right(gate: Tensor, up: Tensor) -> Tensor:
    return unsloth_ref.kernels.swiglu(gate, up)


def wrong(gate: Tensor, up: Tensor) -> Tensor:
    return 1.1 * unsloth_ref.kernels.swiglu(gate, up)


class RightForSomeCalls:
    """Right while it is judged, wrong later, as with a race or a stale cache."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls -= 1
        return right(gate, up) if self.calls > 0 else wrong(gate, up)


class OverGate(torch.autograd.Function):
    """Right, but the backward pass writes the gradient of gate over gate."""

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


def not_implemented(gate: Tensor, up: Tensor) -> Tensor:
    raise NotImplementedError("no such thing")


def with_speed(spec: Spec, **changes: Any) -> Spec:
    return replace(spec, speed=replace(spec.speed, **changes))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    """Measure swiglu on one small shape; returns rows by backend. `liger` stands for other people's kernels."""

    def rows(card: Any, flops: tuple[int, int] = (0, 0), **functions: Callable[..., Any]) -> dict[str, Row]:
        spec = with_speed(specs()["swiglu"], shapes={"small": SHAPE}, flops=lambda *_: flops)

        def load(name: str, device: str, source: Source) -> backends.Judged:
            return backends.Judged(name, {"swiglu": functions[name]}, name)

        monkeypatch.setattr("conformance.bench.measure.specs", lambda: {"swiglu": spec})
        monkeypatch.setattr(backends, "load", load)
        return {row.backend: row for row in Bench(card, RATES, list(functions), "float32").measure("swiglu", "small")}

    return rows


def test_a_right_kernel_is_timed(measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(FakeCard(milliseconds=2.0), fast=right)["fast"]
    assert (row.wrong, row.remark, row.failed) == (None, None, False)
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


@pytest.mark.parametrize("function", [wrong, over_gate, not_implemented])
def test_our_wrong_result_gets_no_time(function: Callable[..., Any], measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(FakeCard(), fast=function)["fast"]
    assert row.wrong is not None
    assert row.failed
    assert row.forward is row.full is row.device_forward is row.device_full is row.peak_mebibytes is None
    assert row.roofline == {}


def test_a_peer_with_wrong_results_is_timed_all_the_same(measure: Callable[..., dict[str, Row]]) -> None:
    incorrect = measure(FakeCard(), liger=wrong)["liger"]
    assert incorrect.wrong is not None and incorrect.wrong.startswith("gate G1")
    assert (incorrect.full, incorrect.failed) == ((1.0, 1.0, 1.0), False)
    in_place = measure(FakeCard(), liger=over_gate)["liger"]
    assert (in_place.wrong, in_place.remark, in_place.full) == (None, "writes over gate", (1.0, 1.0, 1.0))
    absent = measure(FakeCard(), liger=not_implemented)["liger"]
    assert (absent.full, absent.failed) == (None, False)
    assert absent.wrong == "raised NotImplementedError: no such thing"


@pytest.mark.parametrize(
    ("calls", "what"), [(13, "last timed forward"), (2 + 3 + 3 + 1 + 2 * MOST_ROUNDS + 30, "replayed")]
)
def test_the_last_timed_result_is_checked(
    calls: int, what: str, measure: Callable[..., dict[str, Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.bench.sampler.FEWEST_ROUNDS", MOST_ROUNDS)
    row = measure(FakeCard(), fast=RightForSomeCalls(calls))["fast"]
    assert row.wrong is not None and row.wrong.startswith(f"{what}: gate G1")
    assert row.full is None
    assert row.failed


def test_a_replay_that_writes_nothing_is_found(measure: Callable[..., dict[str, Row]]) -> None:
    class IdleGraphs(FakeCard):
        def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
            return (lambda: None), body()

    row = measure(IdleGraphs(), fast=right)["fast"]
    assert row.wrong is not None and row.wrong.startswith("replayed: ")


@pytest.mark.parametrize("name", ["fast", "liger"])
def test_a_time_faster_than_the_roofline_is_an_error(name: str, measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(FakeCard(milliseconds=1e-7), **{name: right})[name]
    assert row.wrong is not None and row.wrong.endswith("of the roofline: not all the work was done")
    assert row.full is row.device_full is row.peak_mebibytes is None
    assert row.failed


def test_the_roofline_is_the_longer_of_the_times_for_bytes_and_products(measure: Callable[..., dict[str, Row]]) -> None:
    forward, backward = 7 * 10**11, 1  # a millisecond of products, and almost none
    row = measure(FakeCard(milliseconds=2.0), (forward, backward), fast=right)["fast"]
    assert row.wrong is None
    assert row.roofline["forward"] == pytest.approx(0.5)
    assert row.roofline["device_forward"] == pytest.approx(1.0)
    assert row.roofline["full"] == pytest.approx((forward + backward) / RATES.matmul / 2e-3)
    assert row.roofline["full"] > 0.5


@pytest.mark.parametrize(
    ("flops", "what"), [((2 * 10**12, 0), "device_forward: 286 %"), ((0, 2 * 10**12), "device_full: 286 %")]
)
def test_a_time_too_short_for_the_products_is_an_error(
    flops: tuple[int, int], what: str, measure: Callable[..., dict[str, Row]]
) -> None:
    """A time that is long enough to move the bytes can be too short for the matrix products."""
    row = measure(FakeCard(milliseconds=2.0), flops, fast=right)["fast"]
    assert row.wrong == f"{what} of the roofline: not all the work was done"
    assert row.full is None
    assert row.failed


def test_products_may_be_faster_than_those_of_random_numbers(measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(FakeCard(milliseconds=2.0), (9 * 10**11, 0), fast=right)["fast"]
    assert row.roofline["device_forward"] == pytest.approx(9 / 7)
    assert not row.failed


def test_a_single_call_may_leave_data_in_the_cache(measure: Callable[..., dict[str, Row]]) -> None:
    """A call in a graph may leave no data in the cache: it writes back what the call before it left there."""
    card = FakeCard(milliseconds=1e-7)
    card.cache_bytes = 2**20
    assert "device" in (measure(card, fast=right)["fast"].wrong or "")


def test_without_a_graph_there_is_no_device_time(measure: Callable[..., dict[str, Row]]) -> None:
    row = measure(FakeCard(graphs=False), liger=right)["liger"]
    assert row.device_full is row.device_backward is None
    assert row.full == (1.0, 1.0, 1.0)
    assert row.remark == "no CUDA graph (it synchronises)"
    assert not row.failed


def test_each_round_starts_with_another_contender() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleave(calls, lambda call: (1.0, call()), seconds=0.0)
    assert all(len(times.samples) == FEWEST_ROUNDS for times, _ in found.values())
    assert "".join(order[3:12]) == "abcbcacab"  # after an untimed first round
    assert interleave({}, lambda call: (1.0, call())) == {}


def test_quantiles() -> None:
    times = Times(tuple(float(sample) for sample in range(101)))
    assert times.spread == (20.0, 50.0, 80.0)
    assert times.median == 50.0


def test_a_shape_may_set_options() -> None:
    spec = with_speed(specs()["cross_entropy"], shapes={"gemma": {"tokens": 3, "vocab": 5, "softcap": 30.0}})
    case = bench_case(spec, "gemma")
    assert case == Case((("tokens", 3), ("vocab", 5)), options=(("softcap", 30.0),))


def small(spec: Spec, largest: int = 8) -> Spec:
    """The spec with shapes of at most this many elements in each dimension."""

    def cut(shape: Mapping[str, Any]) -> dict[str, Any]:
        return {name: min(v, largest) if name in spec.drawing.sizes else v for name, v in shape.items()}

    return with_speed(spec, shapes={name: cut(shape) for name, shape in spec.speed.shapes.items()})


@pytest.mark.parametrize("op", unsloth_ref.kernels.__all__)
def test_every_spec_can_be_timed(op: str) -> None:
    """The shapes of a spec can be built, its bytes are positive, and the reference is right on them."""
    spec = small(specs()[op])
    for shape in spec.speed.shapes:
        case = bench_case(spec, shape)
        inputs = spec.inputs(case, torch.float32, "cpu")
        forward, backward = spec.speed.bytes(inputs)
        assert forward > 0 and (backward > 0) == bool(spec.grads)
        trial = Trial(spec, spec.reference, torch.float32, "cpu")
        contender = Contender(trial, case, inputs, ours=True)
        contender.prepare(2)
        contender.compare("again", *contender.full())
        contender.compare("all of them", *contender.every_full()[-1])
        assert (contender.failure, contender.remark) == (None, None)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (op, shape)
        for op, spec in specs().items()
        for shape in spec.speed.shapes
        if op not in ("packed_attention", "gated_delta_rule", "mamba2_scan")
        and "ignored" not in shape
        and not spec.speed.shapes[shape].get("biased")
    ],
)
def test_matrix_products_are_counted(op: str, shape: str) -> None:
    """A spec counts the products that torch counts for the reference, where no label is ignored.

    moe_mlp's reference adds biases as products with ones, which a spec does not count.
    """
    spec = small(specs()[op])
    case, grads = bench_case(spec, shape), spec.speed.shapes[shape].get("grads", spec.grads)
    trial = Trial(spec, spec.reference, torch.float32, "cpu")
    inputs = spec.inputs(case, torch.float32, "cpu")
    if "labels" in inputs:
        inputs["labels"].clamp_(min=0)
    with FlopCounterMode(display=False) as forward:
        trial.run(case, inputs, grads=())
    with FlopCounterMode(display=False) as full:
        trial.run(case, inputs, grads=grads)
    counted = forward.get_total_flops(), full.get_total_flops() - forward.get_total_flops()
    assert spec.speed.flops(inputs, trial.options(case), grads) == counted


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_products_of_attention_are_those_of_visible_keys(window: int | None) -> None:
    spec = specs()["packed_attention"]
    case = Case((("tokens", 29), ("documents", 3), ("kv_heads", 2), ("group", 3), ("width", 5)), (("window", window),))
    inputs = spec.inputs(case, torch.float32, "cpu")
    bounds = inputs["cu_seqlens"].tolist()
    document = [sum(end <= i for end in bounds[1:]) for i in range(29)]
    pairs = sum(document[i] == document[j] and i - j < (window or 29) for i in range(29) for j in range(i + 1))
    products = pairs * 2 * 3 * 5  # per query head and element
    options = dict(case.options)
    assert spec.speed.flops(inputs, options, spec.grads) == (4 * products, 10 * products)
    assert spec.speed.flops(inputs, options, ()) == (4 * products, 0)


def on_gpu(test: Callable[..., None]) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@pytest.fixture(scope="module")
def card() -> Card:
    return Card()


@on_gpu
def test_only_calls_that_do_not_synchronise_are_captured(card: Card) -> None:
    x = torch.ones(2**20, device="cuda")
    assert "synchroniz" in str(card.capture(lambda: float(x.sum())))
    captured = card.capture(lambda: 2 * x)  # also after a failed capture
    assert not isinstance(captured, str)
    replay, found = captured
    x.fill_(3)
    replay()
    assert found.eq(6).all()
    milliseconds, result = card.time_queued(replay)
    assert 0 < milliseconds < 100
    assert result is None


@on_gpu
def test_a_card_measured(card: Card) -> None:
    """Every card copies at more than 0.1 and less than 100 TB/s."""
    rates = card.rates()
    assert 1e11 < rates.copy < 1e14
    milliseconds, _ = card.time_alone(lambda: torch.ones(1, device="cuda"))
    assert 0 < milliseconds < 100
    assert card.peak_mebibytes(lambda: torch.ones(2**20, device="cuda")) == pytest.approx(4, abs=0.1)
    clock = card.state()["sm_clock_mhz"]
    assert clock is None or 100 < clock < 5000


@on_gpu
@pytest.mark.parametrize("op", unsloth_ref.kernels.__all__)
def test_the_fast_kernels_on_a_card(op: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(specs()[op], 256)
    shape = next(iter(spec.speed.shapes))
    monkeypatch.setattr("conformance.bench.measure.specs", lambda: {op: spec})
    unlimited = Rates(1e18, 1e18)  # inputs this small stay in the cache
    rows = {row.backend: row for row in Bench(card, unlimited, ["fast", "reference"], "bfloat16").measure(op, shape)}
    assert rows.keys() == {"fast", "reference"}
    for row in rows.values():
        assert (row.wrong, row.failed) == (None, False)
        # A call that synchronises, such as a loop over documents in the reference, has no graph; its note says why.
        device = set() if "synchroniz" in (row.remark or "") else {"device_forward", "device_full"}
        assert set(row.samples) == {"forward", "full"} | device
    if not spec.syncs:
        assert rows["fast"].note is None
