"""Files of pytest-benchmark in a report: those of the bench, those of other projects, and their comparison."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.bench import exchange
from conformance.bench.sampler import Times
from conformance.cli import main
from conformance.page.reading import read
from tests.judge.fake_card import STATE, FakeCard
from tests.judge.shown import Parsed, gate_file, shown
from tests.judge.test_bench_shown import FAST


def foreign(path: Path, *medians: float, **changes: Any) -> Path:
    """Of two contenders in a group, as pytest-benchmark writes it; medians in seconds."""
    listed = [
        {
            "group": "sort 1000", "name": f"test_sort[{name}]", "fullname": f"tests/test_sort.py::test_sort[{name}]",
            "params": {}, "extra_info": {}, "stats": {"q1": 0.98 * median, "median": median, "q3": 1.02 * median},
        }
        for name, median in zip(("quick", "merge"), medians, strict=True)
    ]  # fmt: skip
    machine = {"python_version": "3.12.1", "cpu": {"brand_raw": "Some CPU"}}
    content = {"machine_info": machine, "commit_info": {"id": "0123456789abcdef"}, "benchmarks": listed}
    path.write_text(json.dumps(content | changes))
    return path


def test_the_bench_is_read_as_it_was_written(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    samples = {kind: Times(tuple(0.4 + 0.01 * n for n in range(21))) for kind in ("full", "device_full")}
    rows = [replace(FAST, samples=samples), replace(FAST, backend="torch", samples=samples)]
    exchange.write(tmp_path / "times.json", rows, FakeCard(), STATE)  # type: ignore[arg-type]
    found = read(tmp_path / "times.json")
    assert (found.kind, found.meta.gpu, found.meta.driver) == ("bench", "Fake card", "1.2")
    assert found.rows == tuple(replace(row, samples={}) for row in rows)


def test_tests_of_one_name_in_two_classes_are_two(tmp_path: Path) -> None:
    path = foreign(tmp_path / "now.json", 0.002, 0.003)
    content = json.loads(path.read_text())
    for one, group in zip(content["benchmarks"], ("TestA", "TestB"), strict=True):
        one |= {"group": None, "name": "test_sort", "fullname": f"tests/test_sort.py::{group}::test_sort"}
    path.write_text(json.dumps(content))
    assert [row.backend for row in read(path).rows] == ["TestA::test_sort", "TestB::test_sort"]


def test_a_file_of_another_project_is_shown(tmp_path: Path) -> None:
    page = Parsed(shown(tmp_path / "page.html", foreign(tmp_path / "now.json", 0.002, 0.003)))
    assert [cells[2] for cells in page.tables["sort 1000, "][1:]] == ["2.000 [1.960 2.040]", "3.000 [2.940 3.060]"]
    assert "Speed on Some CPU" in page.words and "cold L2 cache" not in page.words


@pytest.mark.parametrize(
    ("median", "factor", "status", "words"),
    [
        (0.0022, "1.05", 1, "1 regressed, 0 skipped, 0 unsure, 0 new, 0 improved."),
        (0.0022, "1.2", 0, "0 regressed, 0 skipped, 0 unsure, 0 new, 0 improved."),
        (0.0018, "1.05", 0, "0 regressed, 0 skipped, 0 unsure, 0 new, 1 improved."),
    ],
)
def test_a_comparison_fails_for_what_takes_longer(
    tmp_path: Path, median: float, factor: str, status: int, words: str
) -> None:
    now, base = foreign(tmp_path / "now.json", median, 0.003), foreign(tmp_path / "base.json", 0.002, 0.003)
    options = ["--base", str(base), "--factor", factor, "-o", str(tmp_path / "out.md")]
    assert main(["report", str(now), *options, "--check"]) == status
    assert f"Against the base: {words}" in (tmp_path / "out.md").read_text()
    assert main(["report", str(now), *options]) == 0


def test_the_check_knows_what_a_gate_found(tmp_path: Path) -> None:
    assert main(["report", str(gate_file(tmp_path / "gate.json")), "--check", "-o", str(tmp_path / "out.md")]) == 1


@pytest.mark.parametrize(
    ("changes", "options", "seen"),
    [
        ({"machine_info": 3}, [], "machine_info: got no object; allowed: a file that --json of"),
        ({"benchmarks": 3}, [], "benchmarks: got no list; allowed: "),
        ({"benchmarks": [3]}, [], "benchmarks: got no object; allowed: "),
        ({"benchmarks": [{"name": "x", "stats": {"q1": 1}}]}, [], "benchmark x: its stats have no number median"),
        ({"benchmarks": []}, [], "got no results; allowed: "),
        ({}, ["--check"], "--check: got nothing to compare with; allowed: with --base, or with the file of a gate"),
        ({}, ["--factor", "0.9"], "--factor: got 0.9; allowed: a number above 1"),
    ],
)
def test_a_usage_error_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], options: list[str], seen: str
) -> None:
    assert main(["report", str(foreign(tmp_path / "now.json", 0.002, 0.003, **changes)), *options]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert seen in printed.err
