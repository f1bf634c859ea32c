"""Times of every backend on every shape through pytest-benchmark, which stores and compares them.

    pytest conformance/bench --benchmark-only --benchmark-autosave
    pytest conformance/bench --benchmark-only --benchmark-compare --benchmark-compare-fail=median:5%

The backends of one shape are timed together, in turns, by the first of their tests.
"""

from functools import cache
from typing import Any

import pytest
import torch

from conformance import backends
from conformance.bench.card import Card, Rates
from conformance.bench.measure import Bench
from conformance.bench.playback import PlaybackTimer
from conformance.bench.table import KINDS, Row
from conformance.peers import Absent
from conformance.specs import specs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TIMER = PlaybackTimer()


def named(config: pytest.Config) -> list[str]:
    """The requested backends."""
    return str(config.getoption("--backend")).split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per operation, shape, backend and kind of time, ordered so that one shape ends before the next."""
    shapes = [(op, shape) for op, spec in specs().items() for shape in spec.speed.shapes]
    names, dtype = named(metafunc.config), str(metafunc.config.getoption("--dtype"))
    metafunc.parametrize(
        ("op", "shape", "dtype", "backend", "kind"),
        [(op, shape, dtype, name, kind) for op, shape in shapes for name in names for kind in KINDS],
    )


@cache
def measured(bench: Bench, op: str, shape: str) -> dict[str, Row]:
    """Every backend on one shape, measured once per process."""
    return {row.backend: row for row in bench.measure(op, shape)}


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, card: tuple[Card, Rates, dict[str, Any]]) -> Bench:
    """A bench of the backends that can be imported."""
    present = []
    for name in named(request.config):
        try:
            backends.load(name, "cuda")
            present.append(name)
        except Absent:
            continue  # its tests are skipped
    return Bench(*card[:2], tuple(present), str(request.config.getoption("--dtype")))


@pytest.mark.benchmark(timer=TIMER)
def test_speed(
    benchmark: Any,
    bench: Bench,
    card: tuple[Card, Rates, dict[str, Any]],
    op: str,
    shape: str,
    dtype: str,
    backend: str,
    kind: str,
) -> None:
    """Report the samples; fail if one of our own results is wrong, or a time is too short for the work."""
    if backend not in bench.names:
        pytest.skip(f"{backend} is not installed")
    row = measured(bench, op, shape).get(backend)
    if row is None:
        pytest.skip(f"{backend} does not define {op}")
    if row.failed:
        pytest.fail(row.wrong or "not timed")
    if kind not in row.samples:
        pytest.skip(row.remark or row.wrong or "not timed")
    benchmark.group = f"{op} {row.shape} {dtype} {kind}"
    extra = row.as_dict() | {
        "copy_bytes_per_second": card[1].copy,
        "matmul_flops_per_second": card[1].matmul,
        "sm_clock_mhz": card[2]["sm_clock_mhz"],
    }
    benchmark.extra_info.update({key: value for key, value in extra.items() if value is not None})
    TIMER.play(benchmark, row.samples[kind])
