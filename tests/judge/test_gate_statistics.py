"""Verdicts about speed on simulated cards: heavy tails, a clock that drifts and steps, processes that differ."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import pytest

from conformance.bench.table import KINDS
from conformance.gate.statistics import (
    EXPECTED,
    FLOOR,
    LOOKS,
    MARGIN,
    SIDES,
    Decision,
    Logs,
    Pool,
    Verdict,
    decide,
    interval,
    margin,
    overall,
)

NOISE = 0.01  # of one time in one round: a Student t distribution with 3 degrees of freedom, times this
PROCESS = {"device": 0.002, "host": 0.005}  # standard deviation of what a process adds for as long as it lives
CLOCKS = (1.0, 0.97, 0.94, 1.05)  # levels between which a clock steps
DRIFT, STEP = 0.03, 0.01  # of the clock, each way; how often it steps
PAGE = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
ORDER = (Verdict.SLOWER, Verdict.FASTER, Verdict.SAME, Verdict.UNSURE)  # of the columns of its table


class SimulatedCard:
    """Its clock drifts by 3 % each way and steps once in a hundred calls; every side has its own lasting bias."""

    def __init__(self, seed: int, slowdown: float) -> None:
        self._random, self._slowdown = random.Random(seed), slowdown
        self._calls, self._clock = 0, 1.0
        self._phase = self._random.uniform(0, math.tau)
        self._bias = {(s, k): self._random.gauss(0, PROCESS[_group(k)]) for s in SIDES for k in KINDS}

    def sample(self, side: str, kind: str) -> float:
        self._calls += 1
        if self._random.random() < STEP:
            self._clock = self._random.choice(CLOCKS)
        drift = DRIFT * math.sin(self._phase + self._calls / 300)
        chi = sum(self._random.gauss(0, 1) ** 2 for _ in range(3))
        noise = NOISE * self._random.gauss(0, 1) / math.sqrt(chi / 3)
        slower = math.log1p(self._slowdown) if side == "head" else 0.0
        return self._clock * math.exp(drift + noise + slower + self._bias[side, kind])


def _group(kind: str) -> str:
    return "device" if kind.startswith("device") else "host"


def gates(count: int, slowdown: float, kinds: Sequence[str] = KINDS) -> Iterator[dict[str, Decision]]:
    """The decisions of gates of a single operation with a single shape, the case in which least is learned."""
    for seed in range(count):
        pool = Pool()
        pool.time("one", kinds, SimulatedCard(seed, slowdown).sample, late=lambda: False)
        if changed := pool.changed("one"):
            pool.time("one", changed, SimulatedCard(count + seed, slowdown).sample, late=lambda: False)
        yield pool.decisions("one")


@cache
def decisions(slowdown: float) -> list[dict[str, Decision]]:
    """Those of 60 gates, or of 200 of the base against itself."""
    return list(gates(60 if slowdown else 200, slowdown))


def shares(slowdown: float) -> Counter[Verdict]:
    """How often each verdict is given."""
    return Counter(overall(found) for found in decisions(slowdown))


def documented() -> Iterator[tuple[float, dict[Verdict, float], int]]:
    """The table of docs/gate.md: a slowdown, the share of each verdict, and the rounds."""
    for line in PAGE.splitlines():
        if row := re.match(r"\| (the base again|(\d) % (slower|faster)) \| \d+ \|(.*)\| (\d+) \|", line):
            slowdown = int(row[2] or 0) / 100 * (-1 if row[3] == "faster" else 1)
            cells = zip(ORDER, row[4].split("|"), strict=True)
            yield slowdown, {one: int(cell.split()[0]) / 100 for one, cell in cells}, int(row[5])


def test_the_documents_give_the_shares_that_are_simulated() -> None:
    """Documented shares and rounds are within four standard deviations, and half of a last digit, of simulated ones."""
    table = list(documented())
    assert [slowdown for slowdown, *_ in table] == [0.0, 0.05, 0.02, 0.01, -0.05]
    for slowdown, expected, rounds in table:
        found = shares(slowdown)
        for one, share in expected.items():
            spread = 4 * math.sqrt(max(share * (1 - share), 0.01) / found.total()) + 0.005
            assert abs(found[one] / found.total() - share) <= spread, (slowdown, one)
        means = [mean(decision.rounds for decision in one.values()) for one in decisions(slowdown)]
        assert abs(mean(means) - rounds) <= 4 * stdev(means) / math.sqrt(len(means)) + 0.5, (slowdown, mean(means))


def test_the_documents_describe_the_card_that_is_simulated() -> None:
    text = " ".join(PAGE.split())
    for words in (
        f"The noise of a single time is {100 * NOISE:g} % times a Student t distribution with 3 degrees of freedom",
        f"The clock drifts by {100 * DRIFT:g} % each way; in one of {'a hundred' if STEP == 0.01 else STEP}",
        f"{100 - 100 * min(CLOCKS):.0f} % below to {100 * max(CLOCKS) - 100:.0f} % above",
        f"a standard deviation of {100 * PROCESS['device']:g} % without launches and {100 * PROCESS['host']:g} % with",
    ):
        assert words in text


def test_base_against_base_is_neither_faster_nor_slower() -> None:
    """200 gates give at most one false verdict, and most are sure."""
    found = shares(0.0)
    assert found[Verdict.FASTER] + found[Verdict.SLOWER] < 2
    assert found[Verdict.SAME] >= 160


@pytest.mark.parametrize(("slowdown", "least"), [(0.05, 0.95), (0.02, 0.5)])
def test_a_slowdown_is_found(slowdown: float, least: float) -> None:
    assert shares(slowdown)[Verdict.SLOWER] >= least * 60


def test_a_gain_is_found_and_never_called_slower() -> None:
    found = shares(-0.05)
    assert found[Verdict.FASTER] >= 57
    assert found[Verdict.SLOWER] == 0


def test_the_interval_holds_the_median_whatever_the_noise() -> None:
    """Far fewer than one in a hundred of 2000 intervals miss, for lopsided noise as well."""
    source = random.Random(0)
    misses = 0
    for _ in range(2000):
        low, high = interval([source.expovariate(1.0) for _ in range(LOOKS[0])])
        misses += not low <= math.log(2) <= high
    assert misses <= 5  # 0.4 expected


def test_too_few_rounds_have_no_interval() -> None:
    with pytest.raises(ValueError, match="rounds: got 5; allowed: 20 or more"):
        interval([0.0] * 5)


def test_processes_that_differ_by_four_times_as_much_are_rarely_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin expects less than these processes differ by, so new processes must see a change too."""
    monkeypatch.setattr(f"{__name__}.PROCESS", {name: 4 * value for name, value in PROCESS.items()})
    found = Counter(overall(one) for one in gates(100, 0.0))
    assert found[Verdict.FASTER] + found[Verdict.SLOWER] < 2


def test_noise_that_no_number_of_rounds_removes_ends_a_comparison_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.NOISE", 0.2)
    lost = [found["full"] for found in gates(20, 0.05, ["full"])]
    assert {decision.verdict for decision in lost} <= {Verdict.NOISY, Verdict.UNSURE}
    assert sum(decision.rounds for decision in lost) < 20 * LOOKS[1]
    for found in gates(20, 2.0, ["full"]):
        assert found["full"].verdict is Verdict.SLOWER  # a change that is larger than the noise is still found


def test_a_change_that_is_seen_once_is_unsure() -> None:
    slow, same = SimulatedCard(1, 0.2), SimulatedCard(2, 0.0)
    pool = Pool()
    pool.time("one", ["device_full"], slow.sample, late=lambda: False)
    assert pool.changed("one") == ["device_full"]
    assert pool.decisions("one")["device_full"].verdict is Verdict.UNSURE
    pool.time("one", ["device_full"], same.sample, late=lambda: False)
    decision = pool.decisions("one")["device_full"]
    assert (decision.verdict, round(decision.ratio, 1)) == (Verdict.UNSURE, 1.0)
    pool.time("two", ["device_full"], same.sample, late=lambda: False)
    assert pool.changed("two") == []


def test_processes_that_differ_widen_the_margin() -> None:
    """A lasting difference between two processes of the base hides one of the same size in the head."""
    assert margin("device", []) == max(FLOOR, MARGIN * EXPECTED["device"])
    assert margin("host", []) > 1.5 * margin("device", [])
    assert margin("device", [0.02, -0.02]) > 0.02
    sure = Logs([0.03 + 1e-4 * n for n in range(20)], [1e-4 * n for n in range(20)])
    assert decide(sure, margin("device", [])).verdict is Verdict.SLOWER
    assert decide(sure, margin("device", [0.02] * 8)).verdict is not Verdict.SLOWER
    apart = Logs(sure.head, [0.04] * 20)
    assert decide(apart, margin("device", [])).verdict is not Verdict.SLOWER


def test_rounds_end_with_the_time() -> None:
    """The first look is always reached; then a late gate stops and says that it is unsure."""
    pool, card = Pool(), SimulatedCard(3, 0.012)
    pool.time("one", ["device_full"], card.sample, late=lambda: True)
    (decision,) = pool.decisions("one").values()
    assert (decision.rounds, decision.verdict) == (LOOKS[0], Verdict.UNSURE)


def test_every_side_takes_every_place_in_a_round() -> None:
    seen: list[str] = []

    def sample(side: str, kind: str) -> float:
        seen.append(side)
        return 1.0

    Pool().time("one", ["full"], sample, late=lambda: False)
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == LOOKS[0]
    assert len(set(rounds)) == 6
    assert all(sorted(one) == sorted(SIDES) for one in rounds)


def test_the_worst_kind_of_time_decides() -> None:
    def of(*verdicts: Verdict) -> Verdict:
        return overall(
            {kind: Decision(one, 1.0, 1.0, 1.0, 0.01, 20) for kind, one in zip(KINDS, verdicts, strict=False)}
        )

    assert of(Verdict.FASTER, Verdict.SLOWER, Verdict.SAME) is Verdict.SLOWER
    assert of(Verdict.FASTER, Verdict.UNSURE) is Verdict.UNSURE
    assert of(Verdict.FASTER, Verdict.SAME) is Verdict.FASTER
    assert of(Verdict.SAME, Verdict.SAME) is Verdict.SAME
    assert of(Verdict.NOISY, Verdict.NOISY, Verdict.SAME, Verdict.FASTER) is Verdict.FASTER
    assert of(Verdict.NOISY, Verdict.SLOWER, Verdict.SAME, Verdict.SAME) is Verdict.SLOWER
    assert of(Verdict.SAME, Verdict.NOISY, Verdict.SAME, Verdict.NOISY) is Verdict.UNSURE
    assert of(Verdict.SAME, Verdict.NOISY) is Verdict.UNSURE
