"""The times of a bench as a picture: a panel per shape, a bar per backend. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from conformance.bench.table import Row

SUFFIXES = (".png", ".svg", ".pdf")
COLUMNS = 2
PANEL_INCHES, BAR_INCHES, MARGIN_INCHES = 6.4, 0.32, 1.0
TITLE_WIDTH = 50  # characters that fit above a panel
CALL, DEVICE, WRONG = "#a9c8e6", "#1f6fb4", "#c4312b"


def lacking(path: Path) -> str | None:
    """Why a plot cannot be written to this file; None if it can."""
    if path.suffix.lower() not in SUFFIXES:
        return f"got {path}; allowed: a name that ends in {', '.join(SUFFIXES)}"
    lacks = f"got {path}, but matplotlib is not installed: pip install 'unsloth-fast[demo]'"
    return None if find_spec("matplotlib") else lacks


def plot(path: Path, rows: Sequence[Row], heading: str) -> None:
    """Write the picture; a process that is stopped meanwhile leaves the old one."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row.op, row.shape, row.dtype) for row in rows))
    panels = [[row for row in rows if (row.op, row.shape, row.dtype) == shape] for shape in shapes]
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    tall = MARGIN_INCHES + BAR_INCHES * max(map(len, panels))
    figure = Figure(figsize=(PANEL_INCHES * columns, tall * lines + MARGIN_INCHES), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{heading}\nms, forward and backward: light with launches and its 20 % and 80 % quantiles, dark on the device"
        " alone; percent of the roofline",
        fontsize=9,
    )
    part = path.resolve().with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(part, dpi=150)
    part.replace(path.resolve())


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    """One shape: the fastest on top."""
    ordered = sorted(rows, key=lambda row: row.full[1] if row.full else float("inf"))
    for place, row in enumerate(ordered):
        if row.full is None:
            axis.text(0, place, f" not timed: {row.wrong or ''}"[:60], va="center", fontsize=8, color=WRONG)
            continue
        low, middle, high = row.full
        axis.barh(place, middle, color=CALL, height=0.7, xerr=[[middle - low], [high - middle]], ecolor="#555555")
        if row.device_full:
            axis.barh(place, row.device_full[1], color=DEVICE, height=0.35)
        share = f", {100 * row.roofline['full']:.0f} %" if "full" in row.roofline else ""
        wrong = "  wrong" if row.wrong else ""
        axis.text(high, place, f"  {middle:.3f}{share}{wrong}", va="center", fontsize=8, color=WRONG if wrong else None)
    axis.set_yticks(range(len(ordered)), [row.backend for row in ordered])
    axis.set_ylim(len(ordered) - 0.5, -0.5)
    axis.set_xlim(0, 1.35 * max((row.full[2] for row in rows if row.full), default=1.0))
    axis.set_title(fill(f"{rows[0].op} {rows[0].shape} {rows[0].dtype}", TITLE_WIDTH), fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
