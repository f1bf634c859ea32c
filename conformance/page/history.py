"""How did a card's results change? The part of the page that shows each figure of a ledger over its revisions.

Each figure is a row with its first and last value and a line chart. The budget use is the largest of all properties.
Times and memory that were measured in different environments are in different rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from conformance.gate.history import Point
from conformance.gate.ledger import Entry
from conformance.page.markup import Markup, table, tag
from conformance.page.model import percent

WIDTH, HEIGHT, EDGE = 160, 28, 4  # of a line chart, and its margin, in units of the SVG
HOW = "One point per revision that has a value; lower is better. The lower edge of a chart is zero."


class Series(NamedTuple):
    """One figure at each point in time; None where the ledger does not hold it."""

    name: str
    values: Sequence[float | None]


def part(points: Sequence[Point]) -> list[Markup]:
    """Build the part: the revisions, then budget use by operation and dtype, then times and memory by shape."""
    among = f"{len(points)} revisions, from {points[0].label} to {points[-1].label}."
    found = [tag("p", among if len(points) > 1 else f"One revision: {points[0].label}."), tag("p", HOW)]
    stacks = {stack: f"stack {place}" for place, stack in enumerate(dict.fromkeys(_stacks(points)), 1)}
    found += [tag("p", f"{name}: {stack}", class_="small") for stack, name in stacks.items()]
    for caption, series, shown in (
        ("Budget use, the largest of all properties", _budget(points), percent),
        ("Milliseconds, forward and backward", _times(points, stacks), "{:.4g}".format),
        ("Peak memory in MiB", _memory(points, stacks), "{:.0f}".format),
    ):
        rows = [_row(one, points, shown) for one in series]
        heads = ("what", "first", "last", "change", "over time")
        found += [table(heads, rows, caption=caption, wide=True, class_="figures times")] if rows else []
    return found


def _budget(points: Sequence[Point]) -> list[Series]:
    def values(point: Point) -> Iterable[tuple[str, float]]:
        for entry in point.ledger.entries.values():
            if entry["kind"] == "property" and entry["budget_use"] is not None:
                yield " / ".join(filter(None, (entry["backend"], entry["op"], entry["dtype"]))), entry["budget_use"]

    return _series(points, values)


def _times(points: Sequence[Point], stacks: Mapping[str, str]) -> list[Series]:
    """The time on the device if the shape has one, else that of a call."""

    def values(point: Point) -> Iterable[tuple[str, float]]:
        for entry, stack in _timed(point):
            for kind, place in (("device_full", "device"), ("full", "call")):
                if kind in entry["milliseconds"]:
                    yield f"{_shape(entry)}, {place}, {stacks[stack]}", entry["milliseconds"][kind]
                    break

    return _series(points, values)


def _memory(points: Sequence[Point], stacks: Mapping[str, str]) -> list[Series]:
    def values(point: Point) -> Iterable[tuple[str, float]]:
        for entry, stack in _timed(point):
            if entry["peak_mebibytes"] is not None:
                yield f"{_shape(entry)}, {stacks[stack]}", entry["peak_mebibytes"]

    return _series(points, values)


def _stacks(points: Sequence[Point]) -> Iterable[str]:
    """The environment of every time, in words."""
    return (stack for point in points for _, stack in _timed(point))


def _timed(point: Point) -> Iterable[tuple[Entry, str]]:
    """The times of a point, each with its environment in words."""
    for entry in point.ledger.entries.values():
        if entry["kind"] == "time":
            environment = point.ledger.environments[entry["environment"]]
            yield entry, ", ".join(f"{what} {value}" for what, value in environment.items() if value is not None)


def _shape(entry: Entry) -> str:
    return f"{entry['backend']} / {entry['op']} / {entry['shape']} / {entry['dtype']}"


def _series(points: Sequence[Point], values: Callable[[Point], Iterable[tuple[str, float]]]) -> list[Series]:
    """One series per name: at each point the largest of its values."""
    found: dict[str, list[float | None]] = {}
    for place, point in enumerate(points):
        for name, value in values(point):
            series = found.setdefault(name, [None] * len(points))
            series[place] = max(value, series[place] or 0.0)
    return [Series(name, series) for name, series in sorted(found.items())]


def _row(series: Series, points: Sequence[Point], shown: Callable[[float], str]) -> tuple[Markup | str, ...]:
    known = [value for value in series.values if value is not None]
    first, last = known[0], known[-1]
    change = f"{100 * (last / first - 1):+.1f} %" if first else ""
    change = "" if change in ("+0.0 %", "-0.0 %") else change
    gone = tag("span", " gone", class_="bad") if series.values[-1] is None else None
    return series.name, shown(first), tag("td", shown(last), gone), change, tag("td", _line(series, points, shown))


def _line(series: Series, points: Sequence[Point], shown: Callable[[float], str]) -> Markup:
    """A line chart with a dot per value; the vertical axis is from zero to the largest value."""
    largest = max(value for value in series.values if value is not None) or 1.0
    step = (WIDTH - 2 * EDGE) / max(1, len(points) - 1)
    at = [
        (EDGE + step * place, HEIGHT - EDGE - value / largest * (HEIGHT - 2 * EDGE), value, points[place].label)
        for place, value in enumerate(series.values)
        if value is not None
    ]
    dots = [
        tag("circle", tag("title", f"{label}: {shown(v)}"), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3) for x, y, v, label in at
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in at)
    first, last = shown(at[0][2]), shown(at[-1][2])
    label = f"{series.name}: from {first} to {last}"
    return tag(
        "svg", tag("polyline", points=path), *dots,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="trend", role="img", aria_label=label,
    )  # fmt: skip
