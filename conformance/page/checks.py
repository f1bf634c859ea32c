"""The part of the page about checks: verdicts, a heat map of budget use, failures, skips, pairs that were not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

from conformance.page.markup import Markup, breakable, row, scrolled, table, tag
from conformance.page.model import Check, Meta, Results, dtypes_of, failures, percent, properties_of
from conformance.properties import PROPERTIES
from conformance.reporting.report import GATES

OPEN = 6  # failures that are shown unfolded
STEPS = 10  # of the heat map's colours
WIDEST, NARROWEST = 34, 2  # columns of a heat map that fit on paper; an operation's name is at least as wide as two
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
PAIRS = 20  # that are listed
LEGEND = (
    "Percent of the error budget, the largest of all cases: 100 is the whole budget. ✓ passed where a budget has no"
    " meaning, ✗ failed, k known deviation, - skipped, empty: not run."
)


def part(file: Results) -> list[Markup]:
    """Build the part, without what the file does not contain."""
    found = [_verdicts(file.checks), _heat(file.checks), _failures(file), _missed(file.checks), _skips(file)]
    return [one for one in found if one is not None]


def _verdicts(checks: Sequence[Check]) -> Markup:
    """One row per operation, one column per dtype."""
    dtypes = dtypes_of(checks)
    rows = []
    for op in sorted({check.op for check in checks}):
        ours = [check for check in checks if check.op == op]
        cells = [_cell([check for check in ours if check.dtype == dtype]) for dtype in dtypes]
        ran = [check for check in ours if check.verdict != "skip"]
        if ours[0].dtype is None:
            cells = [_cell(ours), *(tag("td") for _ in dtypes[1:])] if dtypes else []
        passed = {c.property for c in ran} - {c.property for c in ran if c.verdict != "pass"}
        shares = [check.coverage for check in ran if check.coverage is not None]
        rows.append(
            (
                breakable(op),
                *cells,
                f"{len(passed)}/{len({check.property for check in ran})}",
                f"{sum(check.examples for check in ran):,}".replace(",", "\N{NO-BREAK SPACE}"),
                percent(mean(shares)) if shares else "-",
            )
        )
    heads = ("operation", *dtypes, "properties passed", "cases", "coverage, mean")
    return table(heads, rows, caption="Verdicts by operation and dtype", wide=True, class_="figures")


def _cell(checks: Sequence[Check]) -> Markup:
    """A cell: the worst verdict on some checks, and their largest budget use."""
    used = [check.budget_use for check in checks if check.budget_use is not None and check.verdict != "xfail"]
    verdicts = Counter(check.verdict for check in checks)
    if not verdicts.keys() - {"skip"}:
        return tag("td", "- skipped" if checks else "", class_="dim")
    word, style = "✓ ok", "ok"
    if verdicts["fail"]:
        word, style = f"✗ {verdicts['fail']} failed", "bad"
    elif verdicts["xfail"]:
        word, style = f"k {verdicts['xfail']} known", "known"
    return tag("td", tag("span", word, class_=style), f" {percent(max(used))}" if used else None)


def _heat(checks: Sequence[Check]) -> Markup | None:
    """One row per property, one column per operation and dtype; several tables where one would be wider than paper."""
    shown = [check for check in checks if check.dtype]
    if not shown:
        return None
    columns = {op: dtypes_of(c for c in shown if c.op == op) for op in sorted({check.op for check in shown})}
    parts = _parts({op: max(NARROWEST, len(dtypes)) for op, dtypes in columns.items()})
    tables = [
        _heat_of(shown, {op: columns[op] for op in part}, f" ({place} of {len(parts)})" if len(parts) > 1 else "")
        for place, part in enumerate(parts, 1)
    ]
    return tag("div", *tables, tag("p", LEGEND, class_="small"))


def _parts(widths: Mapping[str, int]) -> list[list[str]]:
    """Operations in groups that are about as wide as each other."""
    count = -(-sum(widths.values()) // WIDEST)
    parts: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for op, width in widths.items():
        parts[before * count // sum(widths.values())].append(op)
        before += width
    return parts


def _heat_of(checks: Sequence[Check], columns: Mapping[str, Sequence[str]], which: str) -> Markup:
    """The table of some operations, with their dtypes."""
    cells = {(check.op, check.dtype, check.property): check for check in checks}
    groups = [tag("th", breakable(op), colspan=len(d), scope="colgroup", class_="first") for op, d in columns.items()]
    flat = [(op, dtype, not place) for op, dtypes in columns.items() for place, dtype in enumerate(dtypes)]
    heads = [
        tag("th", SHORT.get(dtype, dtype), scope="col", class_="first" if first else None) for _, dtype, first in flat
    ]
    rows = [
        row([breakable(name), *(_hot(cells.get((op, dtype, name)), first) for op, dtype, first in flat)])
        for name in properties_of(checks)
    ]
    label = f"Budget use by property, operation and dtype{which}"
    found = tag(
        "table",
        tag("caption", label),
        tag("thead", tag("tr", tag("th", "property", rowspan=2, scope="col"), *groups), tag("tr", *heads)),
        tag("tbody", *rows),
        class_="heat",
    )
    return scrolled(found, label)


def _hot(check: Check | None, first: bool) -> Markup:
    """A cell of the heat map."""
    style = "first " if first else ""
    if check is None:
        return tag("td", class_=style.strip() or None)
    text = {"pass": "✓", "fail": "✗", "xfail": "k", "skip": "-"}[check.verdict]
    title = f"{check.name()}: {check.verdict}"
    if check.budget_use is not None:
        title += f", {percent(check.budget_use)} of the budget"
        if check.verdict == "pass":
            text = f"{100 * check.budget_use:.0f}"
    if check.verdict == "pass":
        style += f"h{min(STEPS, round(STEPS * (check.budget_use or 0)))}"
    else:
        style += {"fail": "bad", "xfail": "known", "skip": "dim"}[check.verdict]
        title += f": {check.first_line()}" if check.message else ""
    return tag("td", text, class_=style, title=title)


def _failures(file: Results) -> Markup | None:
    """Each property that failed, with the commands that reproduce it."""
    found = failures(file.checks)
    shown = [_failure(checks, file.meta, unfolded=len(found) <= OPEN) for checks in found.values()]
    return tag("div", tag("h3", "Failures"), *shown) if shown else None


def _failure(checks: Sequence[Check], meta: Meta, unfolded: bool) -> Markup:
    """A property that failed in some dtypes."""
    first = checks[0]
    holds = PROPERTIES[first.property].statement if first.property in PROPERTIES else None
    asked = [(gate, text) for gate, text in GATES.items() if any(gate in (check.message or "") for check in checks)]
    dtypes = ", ".join(check.dtype for check in checks if check.dtype)
    body = [tag("p", "Must hold: ", holds)] if holds else []
    body += [tag("p", f"{gate} asks: {text}") for gate, text in asked]
    for check in checks:
        again = check.again(meta)
        body.append(tag("h4", check.dtype or check.property))
        body.append(tag("pre", check.message or "failed"))
        body += [tag("p", "Reproduce:", class_="small"), tag("pre", again, class_="command")] if again else []
    title = tag("summary", tag("span", "✗ ", class_="bad"), tag("b", f"{first.op} / {first.property}"), f" {dtypes}")
    return tag("details", title, *body, open="" if unfolded else None)


def _missed(checks: Sequence[Check]) -> Markup | None:
    """The pairs of settings that no property of the file ran; each property's share."""
    found = [check for check in checks if check.missed]
    if not found:
        return None
    rows = [(f"{c.property} {c.dtype or ''}", tag("td", bar(c.coverage or 0.0), percent(c.coverage))) for c in checks]
    by_check = [{pair["pair"]: pair["case"] for pair in check.missed} for check in found]
    everywhere = set.intersection(*map(set, by_check)) if len(found) == len(checks) else set()
    listed = [(tag("code", pair), tag("td", tag("code", by_check[0][pair]))) for pair in sorted(everywhere)]
    left = f" The first {PAIRS} are:" if len(listed) > PAIRS else ""
    return tag(
        "div",
        table(("property", "pairs of settings run"), rows, caption="Coverage by property", class_="figures"),
        tag("p", f"{len(listed)} pairs of settings are run by no property.{left}"),
        table(("pair", "cheapest case"), listed[:PAIRS], caption="Not run", wide=True) if listed else None,
    )


def bar(fraction: float) -> Markup:
    """A bar that shows a fraction, beside its number; from 1 on it is full."""
    length = max(0.0, min(1.0, fraction)) * 80
    return tag(
        "svg",
        tag("rect", width=80, height=8, y=2, class_="rail"),
        tag("rect", width=f"{length:.1f}", height=8, y=2, class_="bar"),
        viewBox="0 0 80 12",
        class_="bar",
        aria_hidden="true",
    )


def _skips(file: Results) -> Markup | None:
    """The reasons of skipped properties, known deviations, and operations that the backend does not define."""
    reasons = Counter((c.property, c.first_line() or "no reason given") for c in file.checks if c.verdict == "skip")
    known = Counter((c.name(), c.first_line().removeprefix("expected: ")) for c in file.checks if c.verdict == "xfail")
    rows = [("known deviation", name, reason) for name, reason in known]
    rows += [(f"skipped {count} times", name, reason) for (name, reason), count in reasons.items()]
    rows += [("not defined", ", ".join(file.meta.not_defined), "")] * bool(file.meta.not_defined)
    shown = table(("", "what", "why"), rows, caption="Not judged, or known", wide=True)
    return tag("details", tag("summary", f"Not judged, or known ({len(rows)})"), shown) if rows else None
