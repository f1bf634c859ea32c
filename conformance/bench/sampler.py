"""Times contenders in turns: if each were timed by itself, a card that warms up would make a difference."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

FEWEST_ROUNDS, MOST_ROUNDS = 20, 300

Sample = Callable[[Callable[[], Any]], tuple[float, Any]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of many calls of one contender."""

    samples: tuple[float, ...]

    @property
    def spread(self) -> tuple[float, float, float]:
        """20 %, 50 % and 80 % quantiles."""
        tenths = quantiles(self.samples, n=10, method="inclusive")
        return tenths[1], tenths[4], tenths[7]

    @property
    def median(self) -> float:
        """50 % quantile."""
        return self.spread[1]


def interleave(
    contenders: Mapping[str, Callable[[], Any]], sample: Sample, seconds: float = 0.5
) -> dict[str, tuple[Times, Any]]:
    """Time each contender once per round; each round starts with another one, so that predecessors change.

    Args:
        contenders: calls to time, by name; each must have run before, so that nothing is compiled here.
        sample: times one call: from the call to (milliseconds, its result).
        seconds: of wall time for all rounds, within FEWEST_ROUNDS and MOST_ROUNDS.

    Returns:
        By name, the times and the result of the last timed call.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, Any] = {}
    order = list(contenders)
    start = time.perf_counter()
    for call in contenders.values():
        sample(call)
    one_round = time.perf_counter() - start
    for _ in range(max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(one_round, 1e-6))))):
        for name in order:
            milliseconds, last[name] = sample(contenders[name])
            samples[name].append(milliseconds)
        order = [*order[1:], *order[:1]]
    return {name: (Times(tuple(samples[name])), last[name]) for name in contenders}
