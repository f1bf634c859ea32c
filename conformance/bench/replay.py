"""GPU times under pytest-benchmark: a timer that plays samples back, so that its statistics are those of the device."""

from collections.abc import Callable
from typing import Any

from conformance.bench.sampler import Times


class ReplayTimer:
    """A clock of its own: between the two readings of a round there lies one sample.

    Pass it as `@pytest.mark.benchmark(timer=...)`, then call `play`.
    """

    def __init__(self) -> None:
        self._now, self._samples, self._inside = 0.0, iter(()), False

    def __call__(self) -> float:
        """The time in seconds."""
        if self._inside:
            self._now += next(self._samples, 0.0)
        self._inside = not self._inside
        return self._now

    def play(self, benchmark: Any, times: Times, call: Callable[[], Any] = lambda: None) -> Any:
        """Let a benchmark fixture with this timer run one round a sample; returns what the call gave."""
        self._samples, self._inside = iter([1e-3 * sample for sample in times.samples]), False
        return benchmark.pedantic(call, rounds=len(times.samples), iterations=1)
