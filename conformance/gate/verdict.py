"""What fails: the results of two sides compared, every regression in one sentence.

A row compares one check, one kernel, one shape or one planted fault:

    {"kind": "property" | "fingerprint" | "time" | "mutant", key fields, "verdict": ..., "regressions": [sentence, ...],
     "base": result or None, "head": result or None}

Its verdict is "same", "improved", "regressed", "new", "lost" or "wrong" (on both sides); for times it is FASTER,
SLOWER, SAME or UNSURE, and None where there is no speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from conformance.gate.statistics import Decision, Verdict, overall
from conformance.mutate.mutant import edit

BUDGET_RISE = 0.1  # of the whole error budget
COVERAGE_FALL = 0.05  # of all pairs of settings
# A kernel that holds a quarter more seldom runs fewer programs at a time by more than the compiler's own variation.
RESOURCE_RISE = 0.25
# The caching allocator rounds requests up to 2 MiB: less is no change of what is asked for.
MEMORY_RISE, MEMORY_STEP = 0.01, 2.0
SURVIVES, KILLED = ("survived", "unreached"), ("killed", "raised")  # verdicts on mutants

Result = Mapping[str, Any]
Row = dict[str, Any]

KEYS = {
    "property": ("op", "property", "dtype"),
    "fingerprint": ("op", "shape", "dtype", "kernel", "target", "index"),
    "time": ("op", "shape", "dtype"),
    "mutant": ("op", "mutant"),
}


def key(kind: str, result: Result) -> tuple[Any, ...]:
    """What a result is about: it has the same key on both sides."""
    return tuple(result[name] for name in KEYS[kind])


def name(kind: str, result: Result) -> str:
    """The key for a sentence."""
    return " / ".join(str(part) for part in key(kind, result) if part is not None)


def passed(result: Result | None) -> bool:
    """Whether a check passed."""
    return result is not None and result["verdict"] == "pass"


def properties(base: Sequence[Result], head: Sequence[Result], rise: float = BUDGET_RISE) -> list[Row]:
    """Compare the results of `run`: a row per check, one per operation for its coverage, one for a lost operation."""
    old, new = ({key("property", one): one for one in side} for side in (base, head))
    defined = {one["op"] for one in head}
    lost = [op for op in dict.fromkeys(one["op"] for one in base) if op not in defined]
    rows: list[Row] = []
    for op in lost:
        about = {"op": op, "property": None, "dtype": None}
        rows.append(_row("property", about, [f"{op}: is lost: it was defined before"], "lost"))
    for which in dict.fromkeys((*old, *new)):
        if which[0] not in lost:
            one, other = old.get(which), new.get(which)
            sentences, verdict = property_change(one, other, rise)
            rows.append(_row("property", other or one or {}, sentences, verdict, one, other))
    return rows + _coverage(base, head)


def property_change(base: Result | None, head: Result | None, rise: float = BUDGET_RISE) -> tuple[list[str], str]:
    """The regressions of one check, and its verdict; without a base everything that fails is one."""
    if base is None and head is None:
        raise ValueError("property: got neither a base nor a head")
    about = name("property", head or base or {})
    if head is None:
        return ([f"{about}: passed before, and is not checked now"], "lost") if passed(base) else ([], "lost")
    if passed(head):
        if base is None or not passed(base):
            return [], "new" if base is None else "improved"
        return _budget(about, base["budget_use"], head["budget_use"], rise)
    message = str(head["message"] or "").partition("\n")[0]
    if base is None:
        return ([f"{about}: is new and fails: {message}"], "regressed") if head["verdict"] == "fail" else ([], "new")
    if passed(base):
        now = {"fail": "fails", "skip": "is skipped", "xfail": "is a known deviation"}[head["verdict"]]
        return [f"{about}: passed before, and {now} now: {message}"], "regressed"
    if head["verdict"] == "fail" and base["verdict"] != "fail":
        return [f"{about}: did not fail before, and fails now: {message}"], "regressed"
    return [], "wrong" if head["verdict"] == "fail" else "same"


def _budget(about: str, old: float | None, new: float | None, rise: float) -> tuple[list[str], str]:
    if old is None or new is None:
        return [], "same"
    if new > old + rise:
        allowed = f"{100 * (old + rise):.3g} % (before: {100 * old:.3g} %)"
        return [f"{about}: budget use: got {100 * new:.3g} %; allowed: {allowed}"], "regressed"
    return [], "improved" if new < old - rise else "same"


def _coverage(base: Sequence[Result], head: Sequence[Result]) -> list[Row]:
    """One row per operation and dtype whose properties cover less; the mean is that of the checks of both sides."""
    rows = []
    shares = [
        {key("property", one): one["coverage"] for one in side if one.get("coverage") is not None}
        for side in (base, head)
    ]
    both = [which for which in shares[0] if which in shares[1]]
    for op, dtype in dict.fromkeys((which[0], which[2]) for which in both):
        old, new = (mean(side[which] for which in both if (which[0], which[2]) == (op, dtype)) for side in shares)
        if new < old - COVERAGE_FALL:
            allowed = f"{100 * (old - COVERAGE_FALL):.0f} % (before: {100 * old:.0f} %)"
            sentence = f"{op} / {dtype}: mean coverage: got {100 * new:.0f} %; allowed: {allowed}"
            about = {"op": op, "property": None, "dtype": dtype}
            rows.append(_row("property", about, [sentence], "regressed", {"coverage": old}, {"coverage": new}))
    return rows


def numbered(prints: Sequence[Result]) -> list[Row]:
    """Fingerprints with an index, for a kernel that one shape launches with several sets of parameters."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = []
    for one in prints:
        which = tuple(one[part] for part in KEYS["fingerprint"][:-1])
        found.append({**one, "index": seen[which]})
        seen[which] += 1
    return found


def fingerprints(base: Sequence[Result], head: Sequence[Result]) -> list[Row]:
    """Compare what both sides compile to: a row per kernel of both, and one per kernel of one."""
    old, new = ({key("fingerprint", one): one for one in numbered(side)} for side in (base, head))
    rows = []
    for which in dict.fromkeys((*old, *new)):
        one, other = old.get(which), new.get(which)
        sentences, verdict = fingerprint_change(one, other)
        rows.append(_row("fingerprint", (other or one or {}), sentences, verdict, one, other))
    return rows


def fingerprint_change(base: Result | None, head: Result | None) -> tuple[list[str], str]:
    """The regressions of one kernel, and its verdict; a kernel of one side alone is none, unless it cannot run."""
    if head is None:
        return [], "lost"
    about = name("fingerprint", head)
    if head["problem"]:
        if base is not None and base["problem"]:
            return [], "wrong"
        return [f"{about}: {head['problem']}"], "regressed"
    if base is None or base["problem"]:
        return [], "new" if base is None else "improved"
    sentences = []
    for what, unit in (("registers", ""), ("stack", " bytes"), ("shared", " bytes"), ("instructions", "")):
        if what not in base or what not in head:  # older revisions count no instructions
            continue
        allowed = base[what] if what == "stack" else int(base[what] * (1 + RESOURCE_RISE))
        if head[what] > allowed:
            sentences.append(f"{about}: {what}: got {head[what]}{unit}; allowed: {allowed} (before: {base[what]})")
    for what in ("load", "store"):
        if head[what] < base[what]:
            sentences.append(f"{about}: widest {what}: got {head[what]} bytes; allowed: {base[what]}, as before")
    return sentences, "regressed" if sentences else "same"


def mutants(base: Sequence[Result], head: Sequence[Result]) -> tuple[list[Row], str]:
    """Compare the results of `mutate`: a row per fault of the head, and both kill rates in a sentence.

    Only a fault that both sides have can be a regression: new code brings faults that may be none.
    """
    old = {edit(one["op"], one["mutant"], one["kind"], one["diff"]): one for one in base}
    rows: list[Row] = []
    for one in head:
        before = old.get(edit(one["op"], one["mutant"], one["kind"], one["diff"]))
        sentences: list[str] = []
        verdict = "new" if before is None else "same"
        if before is not None and before["verdict"] in KILLED and one["verdict"] in SURVIVES:
            killer = " / ".join(filter(None, before["killed_by"][0][:2])) if before["killed_by"] else "a check"
            verdict = "regressed"
            sentences.append(f"{name('mutant', one)}: {one['verdict']} now; {killer} killed it before")
        elif before is not None and before["verdict"] in SURVIVES and one["verdict"] in KILLED:
            verdict = "improved"
        rows.append(_row("mutant", one, sentences, verdict, before, one))
    unseen = [row for row in rows if row["verdict"] == "new"]
    survive = sum(row["head"]["verdict"] in SURVIVES for row in unseen)
    new = f"; {len(unseen)} faults are new, of which {survive} survive" if unseen else ""
    return rows, f"mutants killed: {_killed(base)} of the base, {_killed(head)} of the head{new}"


def _killed(results: Sequence[Result]) -> str:
    """How many mutants were killed, of those that are not known to be harmless."""
    judged = [one["verdict"] for one in results if one["verdict"] in (*SURVIVES, *KILLED)]
    return f"{sum(verdict in KILLED for verdict in judged)} of {len(judged)}"


def times(base: Result, head: Result, decisions: Mapping[str, Decision]) -> Row:
    """Compare the times of one shape; there is no speed where either side is not right.

    Args:
        base, head: rows of the bench.
        decisions: by kind of time.
    """
    about = name("time", head)
    wrong = [f"the {side}: {row['wrong']}" for side, row in (("base", base), ("head", head)) if row["wrong"]]
    found = {} if wrong else decisions
    verdict = overall(found) if found else None
    sentences = [f"{about}: {kind}: {slower(one)}" for kind, one in found.items() if one.verdict is Verdict.SLOWER]
    if head["wrong"] and not base["wrong"]:
        sentences.append(f"{about}: wrong, and has no speed: {head['wrong']}")
    row = _row("time", head, sentences + _memory(about, base, head), verdict, base, head)
    return row | {"times": {kind: asdict(one) for kind, one in found.items()}, "no_speed": "; ".join(wrong) or None}


def slower(decision: Decision) -> str:
    """The end of a sentence about a time."""
    return (
        f"SLOWER: {decision.ratio:.3f} [{decision.low:.3f} {decision.high:.3f}] times the base's;"
        f" allowed: {1 + decision.margin:.3f}"
    )


def _memory(about: str, base: Result, head: Result) -> list[str]:
    old, new = base["peak_mebibytes"], head["peak_mebibytes"]
    if old is None or new is None or new <= (allowed := memory_allowed(old)):
        return []
    return [f"{about}: peak memory: got {new:.1f} MiB; allowed: {allowed:.1f} (before: {old:.1f})"]


def memory_allowed(old: float) -> float:
    """MiB that do not count as a rise."""
    return old + max(MEMORY_RISE * old, MEMORY_STEP)


def _row(
    kind: str,
    about: Result,
    sentences: list[str],
    verdict: str | None,
    base: Result | None = None,
    head: Result | None = None,
) -> Row:
    keys = {part: about.get(part) for part in KEYS[kind]}
    return {"kind": kind, **keys, "verdict": verdict, "regressions": sentences, "base": base, "head": head}


def right(results: Sequence[Result]) -> set[tuple[str, str]]:
    """The pairs of operation and dtype of which no check fails."""
    pairs = {(one["op"], one["dtype"]) for one in results if passed(one)}
    return pairs - {(one["op"], one["dtype"]) for one in results if one["verdict"] == "fail"}
