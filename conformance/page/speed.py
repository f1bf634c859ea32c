"""The part of the page about speed: times with their share of the roofline, and a plot of speed and error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2

from conformance.bench.table import Row, Spread
from conformance.page.checks import bar
from conformance.page.markup import Markup, breakable, table, tag
from conformance.page.model import Results, percent

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 240, 44, 34, 12, 16  # of a plot and its margins, in its units
MOST = 1.2  # the largest budget use of the axis; points above it stand on it
HOW = (
    "Milliseconds with a cold L2 cache, the median of interleaved rounds and in brackets the 20 % and 80 % quantiles."
    " A call includes its launches, device is without them. The bar and the percentage are the share of the roofline:"
    " bytes at the card's copy rate or matrix products at its matmul rate, whichever takes longer."
)
PLAIN = "Milliseconds: the median, and in brackets the quantiles that the file has."


def part(file: Results) -> list[Markup]:
    """The card, then per operation a plot and a table of each shape."""
    meta = file.meta
    rates = [f"copy {meta.copy_bytes_per_second / 1e12:.2f} TB/s"] if meta.copy_bytes_per_second else []
    rates += [f"bf16 matmul {meta.matmul_flops_per_second / 1e12:.0f} TFLOP/s"] if meta.matmul_flops_per_second else []
    names = list(dict.fromkeys(row.backend for row in file.rows))
    found = [tag("p", f"The card: {', '.join(rates)}.")] if rates else []
    found.append(tag("p", HOW if rates else PLAIN, class_="small"))
    found += [tag("p", f"Not timed: {name}: {why}") for name, why in meta.absent.items()]
    for op in dict.fromkeys(row.op for row in file.rows):
        ours = [row for row in file.rows if row.op == op]
        shapes = dict.fromkeys((row.shape, row.dtype) for row in ours)
        groups = [[row for row in ours if (row.shape, row.dtype) == shape] for shape in shapes]
        found.append(tag("h3", breakable(op)))
        found += [plot for plot in [_plot(groups, names)] if plot]
        found += [_times(rows) for rows in groups]
    return found


def _right(row: Row) -> bool:
    return row.wrong is None and not row.failed and row.full is not None


def _time(row: Row, device: bool) -> float:
    """Forward and backward in milliseconds."""
    times = row.device_full if device else row.full
    return times[1] if times else 0.0


def _times(rows: Sequence[Row]) -> Markup:
    """The table of one shape."""
    best = min((row for row in rows if _right(row)), key=lambda row: _time(row, False), default=None)
    heads = (
        "backend",
        "call, forward",
        "call, with backward",
        "device forward",
        "device backward",
        "MiB",
        "budget use",
    )
    shown = []
    for row in rows:
        name = tag("span", f"{row.backend} ", tag("small", "fastest call") if row is best else None)
        remark = "; ".join(filter(None, (row.wrong, row.remark)))
        if row.full is None:
            shown.append((name, tag("td", f"not timed: {row.wrong or row.remark}", colspan=7, class_="bad")))
            continue
        error = tag("td", "✗ wrong", class_="bad") if row.wrong else percent(row.error_use)
        shown.append(
            (
                name,
                _measured(row, "forward", row.forward),
                _measured(row, "full", row.full),
                _measured(row, "device_forward", row.device_forward),
                _measured(row, "device_backward", row.device_backward),
                f"{row.peak_mebibytes:.0f}" if row.peak_mebibytes is not None else "-",
                error,
                tag("td", remark, class_="small"),
            )
        )
    caption = f"{rows[0].shape}, {rows[0].dtype}"
    return table((*heads, "remarks"), shown, caption=caption, wide=True, class_="figures times")


def _measured(row: Row, key: str, time: Spread | float | None) -> Markup:
    """A time, its quantiles and its share of the roofline as number and bar."""
    if time is None:
        return tag("td", "-", class_="dim")
    low, middle, high = time if isinstance(time, tuple) else (None, time, None)
    spread = tag("small", f" [{low:.3f} {high:.3f}]") if low is not None else None
    share = row.roofline.get(key)
    shown = (tag("br"), bar(share), f" {percent(share)}") if share is not None else ()
    return tag("td", tag("b", f"{middle:.3f}"), spread, *shown)


def _plot(groups: Sequence[Sequence[Row]], names: Sequence[str]) -> Markup | None:
    """A plot of budget use over the time relative to the fastest correct backend; None without such times."""
    points: list[tuple[float, Row]] = []
    for rows in groups:
        timed = [row for row in rows if row.full is not None and row.error_use is not None]
        device = all(row.device_full for row in timed)
        best = min((_time(row, device) for row in timed if _right(row)), default=0.0)
        points += [(_time(row, device) / best, row) for row in timed if best > 0 and _time(row, device) > 0]
    if not points:
        return None
    octaves = max(1, ceil(log2(max(2.0, *(ratio for ratio, _ in points)))))
    low = min(0.0, *(log2(ratio) for ratio, _ in points))

    def x(ratio: float) -> float:
        return LEFT + (log2(ratio) - low) / (octaves - low) * (WIDTH - LEFT - RIGHT)

    def y(use: float) -> float:
        return HEIGHT - BOTTOM - min(use, MOST) / MOST * (HEIGHT - BOTTOM - TOP)

    marks = [_mark(names.index(row.backend), x(ratio), y(row.error_use or 0.0), ratio, row) for ratio, row in points]
    label = "Speed and error: a point nearer to the lower left corner is better"
    svg = tag(
        "svg",
        *_axes(octaves, x, y),
        *marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="plot",
        role="img",
        aria_label=label,
    )
    used = [name for name in names if any(row.backend == name for _, row in points)]
    keys = [tag("li", _key(names.index(name)), f" {name}") for name in used]
    return tag("figure", tag("figcaption", label), svg, tag("ul", *keys, class_="keys"))


def _axes(octaves: int, x: Callable[[float], float], y: Callable[[float], float]) -> list[Markup]:
    found = []
    for use in (0.0, 0.25, 0.5, 0.75, 1.0):
        found.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y(use):.1f}", y2=f"{y(use):.1f}", class_="grid"))
        found.append(tag("text", percent(use), x=LEFT - 6, y=f"{y(use) + 4:.1f}", text_anchor="end"))
    for octave in range(octaves + 1):
        at = f"{x(2.0**octave):.1f}"
        found.append(tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        found.append(tag("text", f"{2**octave}x", x=at, y=HEIGHT - BOTTOM + 14, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    words = "time of forward and backward, relative to the fastest correct one"
    found.append(tag("text", words, x=middle, y=HEIGHT - 4, text_anchor="middle"))
    return found


SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6L5.5 4.5h-11z",
    "M0 -6L6 0L0 6L-6 0z",
    "M0 6L5.5 -4.5h-11z",
    "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M-6 -2.5h12v5h-12z",
    "M-2.5 -6h5v12h-5z",
)


def _mark(place: int, x: float, y: float, ratio: float, row: Row) -> Markup:
    """A point: shape and colour are the backend's; hollow if the result is wrong."""
    title = f"{row.backend}, {row.shape}: {ratio:.2f} times the fastest, {percent(row.error_use)} of the budget"
    style = f"mark c{place % len(SHAPES)}" + " hollow" * (row.wrong is not None)
    at = f"translate({x:.1f} {y:.1f})"
    return tag("path", tag("title", title), d=SHAPES[place % len(SHAPES)], transform=at, class_=style)


def _key(place: int) -> Markup:
    shape = tag("path", d=SHAPES[place % len(SHAPES)], class_=f"mark c{place % len(SHAPES)}")
    return tag("svg", shape, viewBox="-7 -7 14 14", class_="key", aria_hidden="true")
