"""What a bench shows: one table a shape, and the same for machines."""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from conformance.bench.card import Card, Rates
from conformance.bench.sampler import Times
from conformance.report import commit, versions

Spread = tuple[float, float, float]  # 20 %, 50 % and 80 % quantiles in milliseconds
PACKAGES = ("liger-kernel", "unsloth", "cut-cross-entropy")


@dataclass(frozen=True)
class Row:
    """One contender on one shape; times are None where none can be given.

    Attributes:
        forward, full: of one call, launch included; full is forward and all gradients.
        device_forward, device_full: of the device alone; None too where a call cannot be held in a CUDA graph.
        device_backward: what the gradients add: median of device_full less that of device_forward.
        peak_mebibytes: memory at the peak of a full call, above its inputs.
        error_use: share of the error budget used on these inputs.
        roofline: for forward, full, device_forward, device_full and device_backward, the time that the card's copy
            takes for the bytes that must move, or its matrix product for the operations, whichever is longer, over
            this time.
        red: the gate that was broken, on the judged inputs or in the last timed result; or a time below what the work
            needs. Only other people's results are timed all the same, and never an impossible time.
        note: what is unlike the contract although the values are right; or why there is no CUDA graph.
        failed: whether this is an error of the bench: red and ours, or an impossible time.
        samples: the times themselves.
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
    red: str | None = None
    note: str | None = None
    failed: bool = False
    samples: dict[str, Times] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """As written to JSON: all but the samples."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}


def heading(card: Card, rates: Rates, state: dict[str, Any]) -> str:
    """The card, what it does at best, and how times were taken."""
    clock = f", SM clock {state['sm_clock_mhz']} MHz" if state["sm_clock_mhz"] else ""
    return (
        f"{card.name}, copy {rates.copy / 1e12:.2f} TB/s, "
        f"bf16 matmul {rates.matmul / 1e12:.0f} TFLOP/s{clock}\n"
        "ms, cold L2, median of interleaved rounds [20 %, 80 %]; one call, launch included; device: CUDA graph; "
        "%: of the roofline: bytes at the copy's rate or matrix products at the matmul's, whichever takes longer"
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
    """One shape as a table."""
    heads = "".join(f"{name:<{width}}" for name, width in COLUMNS)
    title = f"{rows[0].op} {rows[0].shape} {rows[0].dtype}"
    return "\n".join([f"{title:<{NAME_WIDTH}}{heads}".rstrip(), *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    if row.full is None:
        return f"  {row.backend:<{NAME_WIDTH - 2}}not timed: {row.red}"
    cells = (
        _spread(row.forward),
        f"{_spread(row.full)} {_percent(row, 'full')}",
        _device(row, "device_forward", row.device_forward and row.device_forward[1]),
        _device(row, "device_backward", row.device_backward),
        f"{row.peak_mebibytes or 0:.0f}",
        "red" if row.red else f"{100 * (row.error_use or 0):.0f} %",
    )
    padded = "".join(f"{cell:<{width - 1}} " for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"  {row.backend:<{NAME_WIDTH - 2}}{padded}{'; '.join(filter(None, (row.red, row.note)))}".rstrip()


def _spread(times: Spread | None) -> str:
    low, middle, high = times or (0.0, 0.0, 0.0)
    return f"{middle:.3f} [{low:.3f} {high:.3f}]"


def _device(row: Row, key: str, milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f} {_percent(row, key)}"


def _percent(row: Row, key: str) -> str:
    """Nothing where the gradients take less than their work because the forward pass has done their work."""
    share = row.roofline.get(key)
    return "" if share is None else f"{100 * share:3.0f} %"


def write_json(
    path: Path, rows: Sequence[Row], card: Card, rates: Rates, state: dict[str, Any], absent: dict[str, str]
) -> None:
    """The same for machines: {"meta": {...}, "results": [a row, ...]}."""
    meta = {
        "versions": versions() | {package: _version(package) for package in PACKAGES},
        "gpu": card.name,
        **state,
        "copy_bytes_per_second": rates.copy,
        "matmul_flops_per_second": rates.matmul,
        "absent": absent,
        "commit": commit(),
    }
    path.write_text(json.dumps({"meta": meta, "results": [row.as_dict() for row in rows]}, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
