"""What changed against a base: improved, regressed, new, skipped or unsure?

Verdicts are compared as they are. Budget use is compared where both sides ran the same cases on the same stack: then
only the code can have changed it. The gate says which changes are worth a line: a tenth of the budget.

Times are compared on the same card, driver and versions. Each is a median between its 20 % and 80 % quantiles. A ratio
of two lies between the quotients of opposite quantiles, widened by the ratio of the two clocks. If this interval lies
within `FACTOR` of 1, a change of that size is excluded, and there is nothing to report. Otherwise the code is faster or
slower if the interval excludes 1, and anything else is unsure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from conformance.bench.table import Row, Spread
from conformance.case import DTYPES
from conformance.gate.verdict import BUDGET_RISE
from conformance.mutate.mutant import edit
from conformance.page.model import Check, Meta, Results, in_order, percent
from conformance.profiles import PROFILES

T = TypeVar("T")
Word = Literal["regressed", "improved", "new", "skipped", "unsure"]
WORDS: tuple[Word, ...] = ("regressed", "skipped", "unsure", "new", "improved")  # what asks for attention first
FACTOR = 1.05  # the smallest change of a time that is reported


@dataclass(frozen=True)
class Change:
    """One line of a comparison.

    Attributes:
        word: what happened, in a word.
        subject: what it is about, such as an operation and a property.
        text: what happened, in a sentence.
        dtypes: in which dtypes, if the subject does not say so.
        again: the command that reproduces it.
    """

    word: Word
    subject: str
    text: str
    dtypes: tuple[str, ...] = ()
    again: str | None = None

    @property
    def name(self) -> str:
        """What it is about, with the dtypes."""
        return " / ".join(filter(None, (self.subject, ", ".join(self.dtypes))))


def changes(results: Sequence[Results], base: Sequence[Results] | None, factor: float = FACTOR) -> list[Change]:
    """The changes of the results against those of the base, and those that a gate found, in the order of WORDS.

    A file is compared with that of the base that has its kind, backend, device and most of its operations. A time has
    changed if that may be by more than the factor.
    """
    found = [change for one in results for change in _gated(one)]
    theirs = [one for one in base or () if one.kind != "gate"]
    compared: list[Results] = []
    for one in (one for one in results if base is not None and one.kind != "gate"):
        other = max((b for b in theirs if _shared(b, one)), key=lambda b: _shared(b, one), default=None)
        if other is None:
            found.append(Change("new", one.title, f"{one.summary}; the base has no such file"))
        else:
            compared.append(other)
            found += [*_checks(one, other), *_rows(one, other, factor), *_mutants(one, other)]
    found += [Change("skipped", one.title, "only the base has such a file") for one in theirs if one not in compared]
    return sorted(_together(found), key=lambda change: WORDS.index(change.word))


def _together(found: Iterable[Change]) -> Iterable[Change]:
    """Join changes that differ only in the dtype."""
    groups: dict[Change, list[str]] = {}
    for change in found:
        groups.setdefault(replace(change, dtypes=()), []).extend(change.dtypes)
    return (replace(change, dtypes=tuple(in_order(dtypes, list(DTYPES)))) for change, dtypes in groups.items())


def _shared(one: Results, other: Results) -> int:
    """How many operations two files of the same kind, backend and device share; 0 if any of these differs."""
    same = (one.kind, one.meta.backend, one.meta.device) == (other.kind, other.meta.backend, other.meta.device)
    return len(one.ops & other.ops) if same else 0


def _gated(results: Results) -> Iterable[Change]:
    """The changes that a gate found between its two sides."""
    words: dict[str | None, Word] = {"improved": "improved", "FASTER": "improved", "UNSURE": "unsure", "new": "new"}
    of_rows: set[str] = set()
    for one in results.compared:
        of_rows.update(one.regressions)
        for sentence in one.regressions:
            text = sentence.removeprefix(f"{one.name()}: ")
            yield Change("regressed", one.name(), text, again=one.again(results.meta))
        word = "skipped" if one.verdict == "lost" or one.no_speed else words.get(one.verdict)
        if word and not one.regressions:
            yield Change(word, one.name(), one.ratios() or one.no_speed or str(one.verdict))
    for sentence in results.meta.regressions:
        if sentence not in of_rows:
            yield Change("regressed", results.title, sentence)


def _pairs(ours: Iterable[T], theirs: Iterable[T], key: Callable[[T], Hashable]) -> list[tuple[T | None, T | None]]:
    """Pair entries with the same key, None where one side lacks it; those of ours come first."""
    left = {key(one): one for one in theirs}
    found: list[tuple[T | None, T | None]] = [(one, left.pop(key(one), None)) for one in ours]
    return [*found, *((None, one) for one in left.values())]


def _checks(results: Results, base: Results) -> Iterable[Change]:
    differ = _differences(results.meta, base.meta)
    for check, other in _pairs(results.checks, base.checks, lambda one: (one.op, one.property, one.dtype)):
        shown = check or other
        found = _check(check, other, differ)
        if found and shown:
            dtypes = (shown.dtype,) if shown.dtype else ()
            yield Change(found[0], f"{shown.op} / {shown.property}", found[1], dtypes)


def _check(check: Check | None, base: Check | None, differ: str) -> tuple[Word, str] | None:
    """The change of one check; `differ` says why budget uses cannot be compared."""
    now, before = check.verdict if check else "skip", base.verdict if base else "skip"
    if check is None or (now == "skip" != before):
        reason = check.first_line() or "no reason given" if check else "it was not run"
        return ("skipped", f"{reason}; the base says {before}") if before != "skip" else None
    if before == "skip":
        return None if now == "skip" else (("regressed" if now == "fail" else "new"), check.first_line() or now)
    if now != before:
        order = ("pass", "xfail", "fail")
        word: Word = "regressed" if order.index(now) > order.index(before) else "improved"
        return word, check.first_line() or f"{before} to {now}"
    if now != "pass" or base is None or check.budget_use is None or base.budget_use is None:
        return None
    rise = check.budget_use - base.budget_use
    text = f"budget use {percent(base.budget_use)} to {percent(check.budget_use)}"
    if abs(rise) <= BUDGET_RISE:
        return None
    return ("unsure", f"{text}; {differ}") if differ else ("regressed" if rise > 0 else "improved", text)


def _differences(meta: Meta, base: Meta) -> str:
    """The reason why a budget use may differ without a change of the code; empty if there is none."""
    if meta.profile != base.profile:
        return f"profile {meta.profile} against {base.profile}"
    profile = PROFILES.get(meta.profile or "")
    if profile is None or not profile.derandomize:
        return f"profile {meta.profile} draws other cases every time"
    return _stacks(meta, base)


def _stacks(meta: Meta, base: Meta) -> str:
    ours, theirs = ({"card": m.gpu, "driver": m.driver, **m.versions} for m in (meta, base))
    differ = [what for what in (ours | theirs) if ours.get(what) != theirs.get(what)]
    return "; ".join(f"{what} {ours.get(what)} against {theirs.get(what)}" for what in differ)


def _rows(results: Results, base: Results, factor: float) -> Iterable[Change]:
    differ = _stacks(results.meta, base.meta)
    ours, theirs = results.meta.sm_clock_mhz, base.meta.sm_clock_mhz
    clocks = max(ours, theirs) / min(ours, theirs) if ours and theirs else 1.0
    unsure = 0
    for row, other in _pairs(results.rows, base.rows, lambda one: (one.op, one.shape, one.dtype, one.backend)):
        name = " ".join(((row or other).op, (row or other).shape, (row or other).dtype, (row or other).backend))  # type: ignore[union-attr]
        if row is None or other is None:
            yield Change("skipped", name, "it was not timed") if row is None else Change("new", name, _timed(row))
        elif (row.wrong is None) != (other.wrong is None):
            better = Change("improved", name, f"correct, was {other.wrong}")
            yield Change("regressed", name, row.wrong) if row.wrong else better
        elif row.wrong is None and (times := _both(row, other)):
            what, now, before = times
            word = timing(now, before, clocks, factor)
            text = f"{what} {before[1]:.3f} to {now[1]:.3f} ms, {now[1] / before[1]:.2f} times"
            unsure += bool(word and differ)
            if word and not differ:
                yield Change(word, name, text)
    if unsure:
        yield Change("unsure", results.title, f"{unsure} times moved, measured on another stack: {differ}")


def _both(row: Row, base: Row) -> tuple[str, Spread, Spread] | None:
    """A kind of time that both rows have: without launches if possible, else with them."""
    for what, key in (("device", "device_full"), ("call", "full")):
        now, before = getattr(row, key), getattr(base, key)
        if now and before and min(*now, *before) > 0:
            return what, now, before
    return None


def timing(now: Spread, before: Spread, clocks: float, factor: float) -> Word | None:
    """The word for the change of a time; None if it is excluded that the time changed by the factor."""
    low, high = now[0] / before[2] / clocks, now[2] / before[0] * clocks
    if low >= 1 / factor and high <= factor:
        return None
    return "regressed" if low > 1 else "improved" if high < 1 else "unsure"


def _timed(row: Row) -> str:
    return row.wrong or (f"call {row.full[1]:.3f} ms" if row.full else "not timed")


def _mutants(results: Results, base: Results) -> Iterable[Change]:
    """Pair mutants by their edits, because line numbers move with every change of the file."""
    for one, other in _pairs(results.mutants, base.mutants, lambda m: edit(m.op, m.mutant, m.kind, m.diff)):
        name = " ".join(filter(None, ((one or other).op, (one or other).mutant)))  # type: ignore[union-attr]
        if one is None:
            continue  # its source is gone, or the sample is another one
        if one.survives and (other is None or not other.survives):
            yield Change("regressed", name, f"{one.verdict}, was {other.verdict if other else 'not planted'}")
        elif not one.survives and other is not None and other.survives:
            yield Change("improved", name, f"{one.verdict}, was {other.verdict}")
