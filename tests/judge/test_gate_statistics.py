"""Verdicts about speed on simulated cards: heavy tails, a clock that drifts and steps, processes that differ."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean

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
    group,
    interval,
    margin,
    overall,
)

NOISE = 0.01  # of one time in one round: a Student t distribution with 3 degrees of freedom, times this
PROCESS = {"device": 0.002, "host": 0.005}  # standard deviation of what a process adds for as long as it lives
CLOCKS = (1.0, 0.97, 0.94, 1.05)  # levels between which a clock steps
DRIFT, STEP = 0.03, 0.01  # of the clock, each way; how often it steps


class SimulatedCard:
    """Its clock drifts by 3 % each way and steps once in a hundred calls; every side has its own lasting bias."""

    def __init__(self, seed: int, slowdown: float) -> None:
        self._random, self._slowdown = random.Random(seed), slowdown
        self._calls, self._clock = 0, 1.0
        self._phase = self._random.uniform(0, math.tau)
        self._bias = {(s, k): self._random.gauss(0, PROCESS[group(k)]) for s in SIDES for k in KINDS}

    def sample(self, side: str, kind: str) -> float:
        self._calls += 1
        if self._random.random() < STEP:
            self._clock = self._random.choice(CLOCKS)
        drift = DRIFT * math.sin(self._phase + self._calls / 300)
        chi = sum(self._random.gauss(0, 1) ** 2 for _ in range(3))
        noise = NOISE * self._random.gauss(0, 1) / math.sqrt(chi / 3)
        slower = math.log1p(self._slowdown) if side == "head" else 0.0
        return self._clock * math.exp(drift + noise + slower + self._bias[side, kind])


def gates(count: int, slowdown: float, kinds: Sequence[str] = KINDS) -> Iterator[dict[str, Decision]]:
    """The decisions of gates of a single operation with a single shape, the case in which least is learned."""
    for seed in range(count):
        pool = Pool()
        pool.time("one", kinds, SimulatedCard(seed, slowdown).sample, late=lambda: False)
        if changed := pool.changed("one"):
            pool.time("one", changed, SimulatedCard(count + seed, slowdown).sample, late=lambda: False)
        yield pool.decisions("one")


ORDER = (Verdict.SLOWER, Verdict.FASTER, Verdict.SAME, Verdict.UNSURE)
ROWS = {  # of the table of docs/gate.md: by how much the head is slower, and how many gates
    "the base again": (0.0, 2000),
    "5 % slower": (0.05, 200),
    "2 % slower": (0.02, 200),
    "1 % slower": (0.01, 200),
    "5 % faster": (-0.05, 200),
}


@cache
def decisions(head: str) -> list[dict[str, Decision]]:
    """Those of the gates of one row."""
    slowdown, count = ROWS[head]
    return list(gates(count, slowdown))


def shares(head: str) -> dict[Verdict, float]:
    """How often each verdict is given."""
    found = Counter(overall(one) for one in decisions(head))
    return {one: found[one] / found.total() for one in ORDER}


def row(head: str) -> str:
    """As the table has it."""
    percents = " | ".join(f"{100 * share:.0f} %" for share in shares(head).values())
    rounds = mean(decision.rounds for one in decisions(head) for decision in one.values())
    return f"| {head} | {len(decisions(head))} | {percents} | {rounds:.0f} |"


def demand_held(block: str) -> None:
    """Demand that the block of docs/gate.md describes this card, and has what is simulated on it."""
    text = " ".join(block.split())
    for words in (
        f"one shape in {'four' if len(KINDS) == 4 else len(KINDS)} kinds of time",
        f"The noise of a single time is {100 * NOISE:g} % times a Student t distribution with 3 degrees of freedom",
        f"The clock drifts by {100 * DRIFT:g} % each way; in one of {'a hundred' if STEP == 0.01 else STEP} timings",
        f"{100 - 100 * min(CLOCKS):.0f} % below to {100 * max(CLOCKS) - 100:.0f} % above",
        f"a standard deviation of {100 * PROCESS['device']:g} % without launches and {100 * PROCESS['host']:g} % with",
    ):
        assert words in text
    head = f"| head | gates | {' | '.join(one.name for one in ORDER)} | rounds |"
    assert [line for line in block.splitlines() if line.startswith("|")] == [head, "|---" * 7 + "|", *map(row, ROWS)]


@pytest.mark.slow
def test_the_documents_give_what_is_simulated() -> None:
    """Every number of the block is held: one that changes is found."""
    page = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
    block = page.partition("<!-- held by tests/judge/test_gate_statistics.py -->")[2].partition("<!-- end -->")[0]
    demand_held(block)
    for number in re.finditer(r"\d+(?:\.\d+)?", block):
        changed = f"{block[: number.start()]}{float(number[0]) + 1:g}{block[number.end() :]}"
        with pytest.raises(AssertionError):
            demand_held(changed)


@pytest.mark.slow
def test_base_against_base_is_neither_faster_nor_slower() -> None:
    """Fewer than one in a hundred gates give a false verdict, and most are sure."""
    found = shares("the base again")
    assert found[Verdict.FASTER] + found[Verdict.SLOWER] < 0.01
    assert found[Verdict.SAME] >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("head", "least"), [("5 % slower", 0.95), ("2 % slower", 0.5)])
def test_a_slowdown_is_found(head: str, least: float) -> None:
    assert shares(head)[Verdict.SLOWER] >= least


@pytest.mark.slow
def test_a_gain_is_found_and_never_called_slower() -> None:
    found = shares("5 % faster")
    assert found[Verdict.FASTER] >= 0.95
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
