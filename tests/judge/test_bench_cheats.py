"""The bench gives no time to a backend that leaves its work undone, keeps results or replaces a timer."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from conformance import backends
from conformance.bench.measure import Bench
from conformance.bench.table import Row
from conformance.properties import process_state
from conformance.specs import specs
from tests.judge import cheats
from tests.judge.fake_card import RATES, FakeCard


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Row]]:
    """The row of a peer, whose times are shown even where its results are wrong."""

    def measure(function: Any) -> Row:
        swiglu = specs()["swiglu"]
        spec = replace(swiglu, speed=replace(swiglu.speed, shapes={"small": {"rows": 4, "hidden": 64}}))
        monkeypatch.setattr("conformance.bench.measure.specs", lambda: {"swiglu": spec})
        judged = backends.Judged("liger", {"swiglu": function}, "liger")
        monkeypatch.setattr(backends, "load", lambda name, device, source: judged)
        card: Any = FakeCard()
        (found,) = Bench(card, RATES, ["liger"], "float32").measure("swiglu", "small")
        return found

    yield measure
    process_state.restore_functions()


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        (cheats.swiglu_is_lazy, "allowed: torch.Tensor"),
        (cheats.swiglu_leaves_the_work_to_a_thread, "was not complete when the call returned"),
        (cheats.swiglu_replaces_the_timer, "was replaced by"),
        (cheats.swiglu_keeps_results_by_shape, "after the timed inputs have changed in place: gate G1"),
        (cheats.swiglu_keeps_results_by_address, "in place: gate G1"),
    ],
)
def test_a_cheat_gets_no_time(cheat: Any, words: str, row: Callable[[Any], Row]) -> None:
    found = row(cheat.swiglu)
    assert found.wrong is not None and words in found.wrong
    assert found.failed
    assert found.full is found.device_full is found.peak_mebibytes is None


def test_an_honest_peer_is_timed(row: Callable[[Any], Row]) -> None:
    found = row(specs()["swiglu"].reference)
    assert (found.wrong, found.failed, found.full) == (None, False, (1.0, 1.0, 1.0))
