"""The part of the page about mutants: what killed them, by kind, and the diffs of those that survived."""

from __future__ import annotations

from collections import Counter

from conformance.page.markup import Markup, join, table, tag
from conformance.page.model import Meta, Mutant, Results, percent

VERDICTS = ("killed", "raised", "survived", "unreached", "same bits", "equivalent")


def part(file: Results) -> list[Markup]:
    """The kill rate, a table by kind, one by property, survivors, and what was confirmed to be no fault."""
    kinds = sorted({one.kind for one in file.mutants})
    counts = Counter((one.kind, one.verdict) for one in file.mutants)
    rows = [(kind, *(_count(counts[kind, verdict], verdict) for verdict in VERDICTS)) for kind in kinds]
    by = Counter(killer[0] or "" for one in file.mutants for killer in one.killed_by[:1])
    survivors = [_survivor(one, file.meta) for one in file.mutants if one.survives]
    others = [one for one in file.mutants if one.verdict in ("same bits", "equivalent")]
    rate = f"Kill rate {percent(file.meta.kill_rate)}: "
    found = [
        tag("p", rate, "the share of planted faults that a property finds, without those that change nothing."),
        table(("kind", *VERDICTS), rows, caption="Mutants by kind of fault", wide=True, class_="figures"),
        table(("property", "kills first"), by.most_common(), caption="What killed them", class_="figures"),
    ]
    found += [tag("div", tag("h3", "Survivors"), *survivors)] if survivors else []
    found += [_harmless(others)] if others else []
    return found


def _count(count: int, verdict: str) -> Markup:
    bad = count and verdict in ("survived", "unreached")
    return tag("td", f"✗ {count}" if bad else count or "·", class_="bad" if bad else None if count else "dim")


def _survivor(one: Mutant, meta: Meta) -> Markup:
    again = one.again(meta)
    why = ": every result has the bits of the original" if one.same_bits else ""
    why = ": no case runs the changed expression" if one.verdict == "unreached" else why
    return tag(
        "details",
        tag("summary", tag("span", f"✗ {one.verdict} ", class_="bad"), tag("b", f"{one.op} {one.mutant}"), why),
        diff(one.diff),
        *((tag("p", "Again:", class_="small"), tag("pre", again, class_="command")) if again else ()),
        open="",
    )


def diff(text: str) -> Markup:
    """A diff with coloured lines; the first character of a line has the same meaning as its colour."""
    styles = {"+": "added", "-": "removed", "@": "dim"}
    lines = (tag("span", line, class_=styles.get(line[:1])) for line in text.splitlines())
    return tag("pre", join(lines), class_="diff", tabindex=0)  # scrolls sideways, with the keyboard as well


def _harmless(others: list[Mutant]) -> Markup:
    rows = [(one.op, tag("td", tag("code", one.mutant)), one.reason or one.verdict) for one in others]
    shown = table(("operation", "mutant", "why"), rows, caption="No faults", wide=True)
    return tag("details", tag("summary", f"No faults: confirmed, or without effect ({len(rows)})"), shown)
