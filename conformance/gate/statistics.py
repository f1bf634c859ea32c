"""Is one side faster than the other? Verdicts from times that were taken in turns.

In each round three processes time the same call: two of the base and one of the head. The log ratio of the head is that
to the mean of both base processes; the log ratio of the noise is that of the two base processes to each other. Drifts
and steps of the clock act on all three and cancel, except in the rounds in which they happen.

The interval of a median comes from order statistics: its rank distribution is binomial whatever the distribution of the
noise is, so that heavy tails do no harm. All looks at one comparison share its level.

Two processes that run the same code can differ for as long as they live: memory lies elsewhere. No number of rounds
removes this. It is learned from base against base, over all comparisons of the same kind of time in one job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from itertools import cycle, permutations
from statistics import median

LOOKS = (20, 40, 80, 160)  # numbers of rounds after which a comparison may end
LEVEL = 1e-3  # probability that the interval of one comparison misses the median, at any look
FLOOR = 0.01  # smallest change that is ever called one, as a log ratio
# Differences between two processes of the same code that are expected before any were seen, as standard deviations of a
# log ratio. A time with its launch depends on the host as well.
EXPECTED = {"device": 0.0025, "host": 0.0075}
WEIGHT = 4  # the expectation counts as much as this many observed differences
# The head has a process of its own and the base two, so that the log ratio of the head varies by sqrt(3/4) of that of
# base against base: 2.5 of the latter are 2.9 of the former, which chance exceeds in 4 of 1000 comparisons, and twice
# in the same direction in 7 of a million.
MARGIN = 2.5

SIDES = ("base", "again", "head")  # `again` is a second process of the base

Sampler = Callable[[str, str], float]  # from a side and a kind of time to milliseconds


class Verdict(StrEnum):
    """What the times of the head are, compared with those of the base."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    UNSURE = "UNSURE"
    NOISY = "NOISY"  # of one kind of time: more rounds would not help


@dataclass
class Logs:
    """Log ratios of one comparison, one per round."""

    head: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def add(self, milliseconds: dict[str, float]) -> None:
        """Add a round: one time per side."""
        base, again, head = (math.log(milliseconds[side]) for side in SIDES)
        self.head.append(head - (base + again) / 2)
        self.noise.append(again - base)


@dataclass(frozen=True)
class Decision:
    """A verdict and what it rests on; ratios are times of the head divided by times of the base.

    Attributes:
        ratio: the median over the rounds.
        low, high: its interval.
        margin: the change that noise explains, as a fraction.
        rounds: how many.
    """

    verdict: Verdict
    ratio: float
    low: float
    high: float
    margin: float
    rounds: int


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the median, at a level that every look may use.

    Raises:
        ValueError: there are too few values.
    """
    ordered, rank = sorted(values), _rank(len(values))
    return ordered[rank], ordered[-1 - rank]


@cache
def _rank(count: int) -> int:
    """The largest rank, from 0, that the median is below with at most half the level of one look."""
    allowed = LEVEL / (len(LOOKS) + 1) / 2  # one more look, where time runs out
    below = rank = 0
    while (below := below + math.comb(count, rank)) <= allowed * 2**count:
        rank += 1
    if rank == 0:
        raise ValueError(f"rounds: got {count}; allowed: {LOOKS[0]} or more")
    return rank - 1


def margin(group: str, differences: Collection[float]) -> float:
    """The log ratio that two processes of the same code may have.

    Args:
        group: a name in EXPECTED.
        differences: medians of base against base of all comparisons in this group.
    """
    squares = WEIGHT * EXPECTED[group] ** 2 + sum(one**2 for one in differences)
    return max(FLOOR, MARGIN * math.sqrt(squares / (WEIGHT + len(differences))))


def decide(logs: Logs, noise: float) -> Decision:
    """The verdict of one comparison; `noise` is the margin of its group.

    The head is slower, or faster, if its whole interval is beyond the margin and beyond the interval of base against
    base. It is the same if its whole interval is within the margin, or within twice the floor. It is noisy if all
    rounds would not show any of these: an interval shrinks with the square root of their number, and would still be too
    wide to lie within the margin, or to leave out zero.
    """
    low, high = interval(logs.head)
    beyond = max(noise, *map(abs, interval(logs.noise)))
    within = max(noise, 2 * FLOOR)
    at_best = (high - low) / 2 * math.sqrt(len(logs.head) / LOOKS[-1])
    verdict = Verdict.UNSURE
    if low > beyond:
        verdict = Verdict.SLOWER
    elif high < -beyond:
        verdict = Verdict.FASTER
    elif max(-low, high) < within:
        verdict = Verdict.SAME
    elif at_best > max(within, abs(median(logs.head))):
        verdict = Verdict.NOISY
    ratio, low, high = (math.exp(value) for value in (median(logs.head), low, high))
    return Decision(verdict, ratio, low, high, math.expm1(beyond), len(logs.head))


class Pool:
    """All comparisons of one job, which share what they learn about noise.

    A change must be seen twice, the second time by processes that were started anew: what a process has by chance is
    then seldom the same.
    """

    def __init__(self) -> None:
        self._logs: dict[tuple[str, str], list[Logs]] = {}

    def time(self, job: str, kinds: Collection[str], sample: Sampler, late: Callable[[], bool]) -> None:
        """Time one job in rounds, until every kind of time has a verdict, or time is over.

        Args:
            job: the name of the comparison: operation, dtype and shape.
            kinds: kinds of time; each is a comparison of its own.
            sample: times one side.
            late: whether no more rounds may begin; at least LOOKS[0] are run.
        """
        unsure = {kind: Logs() for kind in kinds}
        for kind, logs in unsure.items():
            self._logs.setdefault((job, kind), []).append(logs)
        orders = cycle(permutations(SIDES))  # each side comes first, second and last, after either of the others
        for rounds in range(1, LOOKS[-1] + 1):
            if rounds > LOOKS[0] and late():
                return
            order = next(orders)
            for kind, logs in unsure.items():
                logs.add({side: sample(side, kind) for side in order})
            if rounds in LOOKS:
                found = {
                    kind: decide(logs, margin(group(kind), self._differences(kind))) for kind, logs in unsure.items()
                }
                unsure = {kind: logs for kind, logs in unsure.items() if found[kind].verdict is Verdict.UNSURE}
            if not unsure:
                return

    def changed(self, job: str) -> list[str]:
        """The kinds of time of a job that have a change to be seen again."""
        return [kind for kind, found in self._seen(job).items() if found[0].verdict in (Verdict.FASTER, Verdict.SLOWER)]

    def decisions(self, job: str) -> dict[str, Decision]:
        """The verdict of each kind of time of a job, by what is known now."""
        return {kind: _confirmed(found) for kind, found in self._seen(job).items()}

    def _seen(self, job: str) -> dict[str, list[Decision]]:
        """By kind of time, the decision of each time that a job was timed."""
        return {
            kind: [decide(one, margin(group(kind), self._differences(kind))) for one in logs if _complete(one)]
            for (name, kind), logs in self._logs.items()
            if name == job and _complete(logs[0])
        }

    def _differences(self, kind: str) -> list[float]:
        same = [one for (_, other), logs in self._logs.items() if group(other) == group(kind) for one in logs]
        return [median(one.noise) for one in same if _complete(one)]


def _complete(logs: Logs) -> bool:
    return len(logs.head) >= LOOKS[0]


def _confirmed(seen: list[Decision]) -> Decision:
    """The smaller change of two that agree; UNSURE if they do not, or if a change was seen once."""
    smallest = min(seen, key=lambda one: abs(math.log(one.ratio)))
    once = seen[0].verdict in (Verdict.SAME, Verdict.NOISY)
    sure = len({one.verdict for one in seen}) == 1 and (len(seen) > 1 or once)
    return replace(
        smallest, verdict=seen[0].verdict if sure else Verdict.UNSURE, rounds=sum(one.rounds for one in seen)
    )


def group(kind: str) -> str:
    """The name in EXPECTED that a kind of time belongs to."""
    return "device" if kind.startswith("device") else "host"


def overall(decisions: Mapping[str, Decision]) -> Verdict:
    """The verdict of a job: the worst of its kinds of time; SAME gives way to a change.

    A noisy time with launches does not count if the same passes have a verdict without launches; else it is unsure.
    """
    found = {
        Verdict.UNSURE if decision.verdict is Verdict.NOISY else decision.verdict
        for kind, decision in decisions.items()
        if decision.verdict is not Verdict.NOISY or _noisy(decisions.get(f"device_{kind}"))
    }
    order = (Verdict.SLOWER, Verdict.UNSURE, Verdict.FASTER, Verdict.SAME)
    return next(verdict for verdict in order if verdict in found)


def _noisy(decision: Decision | None) -> bool:
    return decision is None or decision.verdict is Verdict.NOISY
