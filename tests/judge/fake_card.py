"""A stand-in for a GPU: the bench runs with it on a CPU."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from conformance.bench.card import Rates

RATES = Rates(copy=4e12, matmul=7e14)
STATE = {"driver": "1.2", "sm_clock_mhz": 1980}


class FakeCard:
    """A card whose calls take the time that a test chooses, and whose graphs repeat the calls."""

    device = "cpu"
    name = "Fake card"
    cache_bytes = 0

    def __init__(self, milliseconds: float = 1.0, graphs: bool = True) -> None:
        self.milliseconds, self.graphs = milliseconds, graphs

    def time_alone(self, call: Callable[[], Any]) -> tuple[float, Any]:
        return self.milliseconds, call()

    time_queued = time_alone

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], Any], Any] | str:
        if not self.graphs:
            return "it synchronises"
        found = body()

        def replay() -> None:
            for old, new in zip(flat(found), flat(body()), strict=True):
                old.detach().copy_(new.detach())

        return replay, found

    def peak_mebibytes(self, call: Callable[[], Any]) -> float:
        call()
        return 3.0

    def free_memory(self) -> None:
        pass


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for part in found for tensor in flat(part)]
