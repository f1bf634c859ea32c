"""The measured error rates of the gate, as a part of docs/gate.md between two markers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, quantiles
from typing import Any

from conformance.bench.table import KINDS
from conformance.gate.statistics import EXPECTED, Verdict, group
from conformance.page.markdown import table
from tests.judge.power.gate import BASE, WRONG_KERNEL

Json = Mapping[str, Any]

BEGIN, END = "<!-- measured by tests.judge.power -->", "<!-- end of what is measured -->"
CONFIDENCE = 0.95
NO_SPEED = "no speed"
DIFFERENCES = """\
The difference between two processes that run the same code, as the median over the rounds of a gate. The last column is
the spread of a single round."""


def into(document: str, files: Sequence[Json]) -> str:
    """The document with the part between the markers replaced.

    Raises:
        ValueError: a marker is missing, or the files are of different cards or versions.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"document: got no {BEGIN!r} and {END!r}; allowed: one of each")
    return f"{before}{BEGIN}\n{text(files)}\n{END}{after}"


def text(files: Sequence[Json]) -> str:
    """The measured rates, from files of one card and the same versions."""
    metas = [file["meta"] for file in files]
    if any((meta["gpu"], meta["versions"]) != (metas[0]["gpu"], metas[0]["versions"]) for meta in metas):
        raise ValueError("files: got different cards or versions; allowed: one")
    gates = [gate for file in files for gate in file["results"]]
    sets = sum(meta["sets_of_processes"] for meta in metas)
    minutes = sum(meta["seconds"] for meta in metas) / 60
    versions = metas[0]["versions"]
    stack = f"{metas[0]['gpu']}, torch {versions['torch']}, triton {versions['triton']}"
    started = f"{len(gates)} gates, {sets} sets of three processes, {minutes:.0f} minutes"
    planted = [line for meta in metas for line in meta["planted"]]
    parts = [f"{stack}; {started}.", _verdicts(gates, planted), _false(gates), _differences(gates)]
    return "\n\n".join(parts)


def _verdict(gate: Json) -> str:
    return gate["verdict"] or NO_SPEED


def _verdicts(gates: Sequence[Json], planted: Sequence[Json]) -> str:
    order = (Verdict.SLOWER, Verdict.FASTER, Verdict.SAME, Verdict.UNSURE, NO_SPEED)
    rows: list[list[str]] = []
    for head in dict.fromkeys((BASE, *sorted(_shares(gates)), WRONG_KERNEL)):
        own = [gate for gate in gates if gate["head"] == head]
        if not own:
            continue
        counts = Counter(map(_verdict, own))
        rounds = [mean(one["rounds"] for one in gate["times"].values()) for gate in own if gate["times"]]
        cells = [_name(head), str(len(own)), *(str(counts[one]) for one in order)]
        rows.append([*cells, f"{mean(rounds):.0f}" if rounds else "-", _measured(head, planted)])
    return table(("head", "gates", *order, "rounds", "measured slowdown"), rows)


def _shares(gates: Sequence[Json]) -> set[str]:
    return {gate["head"] for gate in gates} - {BASE, WRONG_KERNEL}


def _name(head: str) -> str:
    if head in (BASE, WRONG_KERNEL):
        return {BASE: "base against base", WRONG_KERNEL: "a wrong kernel"}[head]
    return f"planted: {100 * float(head):g} % slower"


def _measured(head: str, planted: Sequence[Json]) -> str:
    """The slowdowns of single passes and shapes as the process measured them."""
    found = [line[what] for line in planted if str(line["planted"]) == head for what in ("forward", "full")]
    return f"{100 * min(found):.1f} % to {100 * max(found):.1f} %" if found else "-"


def _false(gates: Sequence[Json]) -> str:
    own = [gate for gate in gates if gate["head"] == BASE and gate["verdict"]]
    false = [gate for gate in own if gate["verdict"] in (Verdict.SLOWER, Verdict.FASTER)]
    if not own:
        return "No gate of the base against itself has a verdict."
    bound = 100 * upper_bound(len(false), len(own))
    named = f": {', '.join(sorted({' '.join((gate['op'], gate['shape'])) for gate in false}))}" if false else ""
    return (
        f"False changes: {len(false)} of {len(own)}{named}."
        f" With a confidence of {100 * CONFIDENCE:.0f} % their rate is below {bound:.1f} %."
    )


def upper_bound(found: int, count: int) -> float:
    """The probability at which this few are found once in 1 / (1 - CONFIDENCE) times, by Clopper and Pearson."""
    low, high = found / count, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        terms = (math.comb(count, k) * middle**k * (1 - middle) ** (count - k) for k in range(found + 1))
        low, high = (middle, high) if sum(terms) > 1 - CONFIDENCE else (low, middle)
    return high


def _differences(gates: Sequence[Json]) -> str:
    rows: list[list[str]] = []
    for kind in KINDS:
        pairs = [abs(one) for one in _pairs(gates, kind)]
        if len(pairs) < 2:
            continue
        rounds = [gate["differences"][0][kind]["round"] for gate in gates if kind in (gate["differences"] or [{}])[0]]
        squares = math.sqrt(mean(one**2 for one in pairs))
        most = quantiles(pairs, n=20, method="inclusive")[-1]
        shown = (EXPECTED[group(kind)], squares, most, max(pairs), mean(rounds))
        rows.append([kind, str(len(pairs)), *(f"{100 * one:.2f} %" for one in shown)])
    heads = ("kind of time", "pairs", "expected", "root mean square", "95 % are below", "largest", "single round")
    return f"{DIFFERENCES}\n\n{table(heads, rows)}"


def _pairs(gates: Sequence[Json], kind: str) -> Iterator[float]:
    """Log ratios in the first set of processes of each gate: a second set is there only after a change."""
    for gate in gates:
        for one in gate["differences"][:1]:
            if kind in one:
                yield one[kind]["again"]
                if gate["head"] == BASE:
                    yield one[kind]["head"]
