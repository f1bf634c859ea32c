"""Reports recorded GPU times through pytest-benchmark, whose own timer would measure the CPU."""

from typing import Any

from conformance.bench.sampler import Times


class PlaybackTimer:
    """A simulated clock: between the two readings of a round, exactly one recorded sample passes.

    Pass it as `@pytest.mark.benchmark(timer=...)`, then call `play`.
    """

    def __init__(self) -> None:
        self._now, self._samples, self._inside = 0.0, iter(()), False

    def __call__(self) -> float:
        """The simulated time in seconds."""
        if self._inside:
            self._now += next(self._samples, 0.0)
        self._inside = not self._inside
        return self._now

    def play(self, benchmark: Any, times: Times) -> None:
        """Run one round per sample in a benchmark fixture that uses this timer."""
        self._samples, self._inside = iter([1e-3 * sample for sample in times.samples]), False
        benchmark.pedantic(lambda: None, rounds=len(times.samples), iterations=1)
