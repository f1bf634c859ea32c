"""Times in the file format of pytest-benchmark, for its `compare` and for github-action-benchmark.

Names and statistics are those of `pytest conformance/bench --benchmark-json FILE`, so that both kinds of file can be
compared with each other.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conformance.bench.card import Card
from conformance.bench.table import KINDS, Row
from conformance.reporting import results_file
from conformance.specs import specs


def lacking() -> str:
    """The reason why such a file cannot be written here; empty if it can."""
    if find_spec("pytest_benchmark"):
        return ""
    return "needs pytest-benchmark, which is not installed: pip install 'unsloth-fast[bench]'"


def write(path: Path, rows: Sequence[Row], card: Card, state: dict[str, Any]) -> None:
    """Write one benchmark for each kind of time of each row that has one. A row that failed has none.

    Args:
        path: of the file.
        rows: with samples, in milliseconds; the file has seconds.
        card: the GPU, which the machine information names.
        state: of the card.
    """
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
    from pytest_benchmark.utils import get_commit_info

    right = [row for row in rows if not row.failed]
    machine = pytest_benchmark_generate_machine_info() | results_file.versions()
    found = {
        "machine_info": machine | {"gpu": card.name, "driver": state["driver"]},
        "commit_info": get_commit_info(),
        "benchmarks": [_benchmark(row, kind) for row in right for kind in KINDS if kind in row.samples],
        "datetime": datetime.now(UTC).isoformat(),
        "version": version("pytest-benchmark"),
    }
    results_file.write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _benchmark(row: Row, kind: str) -> dict[str, Any]:
    from pytest_benchmark.stats import Stats

    shape = _shape(row)
    param = f"{row.op}-{shape}-{row.dtype}-{row.backend}-{kind}"
    stats = Stats()
    for sample in row.samples[kind].samples:
        stats.update(1e-3 * sample)
    return {
        "group": f"{row.op} {row.shape} {row.dtype} {kind}",
        "name": f"test_speed[{param}]",
        "fullname": f"conformance/bench/test_speed.py::test_speed[{param}]",
        "params": {"op": row.op, "shape": shape, "dtype": row.dtype, "backend": row.backend, "kind": kind},
        "param": param,
        "extra_info": {key: value for key, value in row.as_dict().items() if value is not None},
        "options": {},
        "stats": stats.as_dict() | {"data": stats.data, "iterations": 1},
    }


def _shape(row: Row) -> str:
    """The name of a row's shape in the spec, which may have several words; sizes and options follow it."""
    names = [name for name in specs()[row.op].speed.shapes if row.shape.startswith(f"{name} ")]
    return max(names, key=len, default=row.shape.partition(" ")[0])
