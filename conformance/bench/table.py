"""The output of a bench: one table per shape, and JSON."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from conformance.bench.card import Card, Rates
from conformance.bench.sampler import Times
from conformance.peers import PACKAGES
from conformance.reporting import results_file
from conformance.reporting.results_file import commit, versions

KINDS = ("forward", "full", "device_forward", "device_full")  # of times: the fields of a row that are measured
Spread = tuple[float, float, float]  # 20 %, 50 % and 80 % quantiles in milliseconds


@dataclass(frozen=True)
class Row:
    """One contender on one shape. Times are in milliseconds, and None if there is none. The fields are JSON keys.

    Attributes:
        forward, full: one call, including the launch; full is the forward pass and all gradients.
        device_forward, device_full: without launches; None if a call cannot be captured in a CUDA graph.
        device_backward: the part of the gradients: median of device_full minus median of device_forward.
        peak_mebibytes: peak memory of a full call, above its inputs.
        error_use: fraction of the error budget used on these inputs.
        roofline: for each time, the lower bound divided by the time. The bound is that of moving the bytes at the
            card's copy rate or of the matrix products at its matmul rate, whichever is longer.
        wrong: the broken gate, on the judged inputs or in the last timed result; or a time that is too short for the
            work. Peers are timed even if their results are wrong, but an impossible time is never shown.
        remark: a deviation from the contract that leaves the values correct, or the reason why there is no CUDA graph.
        failed: whether this is an error of the bench: one of our own backends is wrong, or a time is impossible.
        samples: all times.
    """

    op: str
    shape: str
    dtype: str
    backend: str
    forward: Spread | None = None
    full: Spread | None = None
    device_forward: Spread | None = None
    device_full: Spread | None = None
    device_backward: float | None = None
    peak_mebibytes: float | None = None
    error_use: float | None = None
    roofline: dict[str, float] = field(default_factory=dict)
    wrong: str | None = None
    remark: str | None = None
    failed: bool = False
    samples: dict[str, Times] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON, without the samples."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}


def heading(card: Card, rates: Rates, state: dict[str, Any]) -> str:
    """The card, its peak rates, and how times are measured."""
    clock = f", SM clock {state['sm_clock_mhz']} MHz" if state["sm_clock_mhz"] else ""
    return (
        f"{card.name}, copy {rates.copy / 1e12:.2f} TB/s, "
        f"bf16 matmul {rates.matmul / 1e12:.0f} TFLOP/s{clock}\n"
        "times in ms with a cold L2 cache: median [20 %, 80 %] of interleaved rounds; one call including its launch; "
        "device: without launches, in a CUDA graph\n"
        "%: of the roofline, bytes at the copy rate or matrix products at the matmul rate, whichever takes longer"
    )


COLUMNS = (
    ("forward", 24),
    ("forward + backward", 29),
    ("device forward", 16),
    ("device backward", 17),
    ("peak MiB", 10),
    ("error use", 11),
)
NAME_WIDTH = 56


def text(rows: Sequence[Row]) -> str:
    """The table of one shape."""
    heads = "".join(f"{name:<{width}}" for name, width in COLUMNS)
    title = f"{rows[0].op} {rows[0].shape} {rows[0].dtype}"
    return "\n".join([f"{title:<{NAME_WIDTH}}{heads}".rstrip(), *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    if row.full is None:
        return f"  {row.backend:<{NAME_WIDTH - 2}}not timed: {row.wrong}"
    cells = (
        _spread(row.forward),
        f"{_spread(row.full)} {_percent(row, 'full')}",
        _device(row, "device_forward", row.device_forward and row.device_forward[1]),
        _device(row, "device_backward", row.device_backward),
        f"{row.peak_mebibytes or 0:.0f}",
        "FAIL" if row.wrong else f"{100 * (row.error_use or 0):.0f} %",
    )
    padded = "".join(f"{cell:<{width - 1}} " for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"  {row.backend:<{NAME_WIDTH - 2}}{padded}{'; '.join(filter(None, (row.wrong, row.remark)))}".rstrip()


def _spread(times: Spread | None) -> str:
    low, middle, high = times or (0.0, 0.0, 0.0)
    return f"{middle:.3f} [{low:.3f} {high:.3f}]"


def _device(row: Row, key: str, milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f} {_percent(row, key)}"


def _percent(row: Row, key: str) -> str:
    """Percent of the roofline; empty if the forward pass did part of the work of the gradients."""
    fraction = row.roofline.get(key)
    return "" if fraction is None else f"{100 * fraction:3.0f} %"


def write_json(
    path: Path, rows: Sequence[Row], card: Card, rates: Rates, state: dict[str, Any], absent: dict[str, str]
) -> None:
    """Write JSON: {"meta": {...}, "results": [a row, ...]}."""
    meta = {
        "versions": versions() | {package: _version(package) for package in PACKAGES.values() if package is not None},
        "gpu": card.name,
        **state,
        "copy_bytes_per_second": rates.copy,
        "matmul_flops_per_second": rates.matmul,
        "absent": absent,
        "commit": commit(),
    }
    results_file.write(path, meta, [row.as_dict() for row in rows])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
