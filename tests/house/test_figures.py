"""Figures in the documents come from docs/results and the ledger; those without a file are records with a date."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.gate import ledger
from docs import figures
from tests.judge.shown import bench_file, run_file
from tests.judge.test_bench_shown import ROWS

ROOT = figures.ROOT
AGAIN = "; run: make figures"
RECORD = re.compile(r"^<!-- record -->\n\n\*Recorded \d{4}-\d{2}-\d{2}\b.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
UNITS = re.compile(r"\d ?(?:ms|us|[GM]iB|tokens/s|TB/s|TFLOP/s)\b")
# The blocks that a document must have.
STATED = {"README.md": {"steps"}, "docs/benchmarks.md": {"measured", "budget", "steps"}}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: path.name)
def test_every_block_is_what_its_files_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert figures.rendered(text) == text, f"{path.name} differs from its sources{AGAIN}"
    name = path.relative_to(ROOT).as_posix()
    assert {one[0].split()[0] for one in figures.BLOCK.findall(text)} >= STATED.get(name, set())


def test_the_page_and_the_comment_are_those_of_the_results() -> None:
    for path, text in figures.reports().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs from docs/results{AGAIN}"
        assert f"]({path.relative_to(ROOT).as_posix()})" in text_of("README.md")


@pytest.mark.parametrize("name", STATED)
def test_no_figure_stands_outside_of_a_block(name: str) -> None:
    """A table outside holds no number, and a sentence outside no measured quantity."""
    left = RECORD.sub("", figures.BLOCK.sub("", text_of(name)))
    assert "<!-- record" not in left and "<!-- end" not in left
    left = re.sub(r"^```.*?^```$|`[^`\n]*`", "", left, flags=re.MULTILINE | re.DOTALL)
    cells = [cell.strip() for line in left.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [cell for cell in cells if re.match(r"[\d.]", cell)] == []
    assert [line for line in left.splitlines() if UNITS.search(line)] == []


def test_the_ledgers_hold_the_committed_results() -> None:
    """Recording them again changes nothing: no figure is better than the ledger, and none is worse beyond noise."""
    paths = list((ROOT / figures.RESULTS).glob("*.json"))
    assert paths
    for path in paths:
        results = ledger.results_in(path)
        recorded = ledger.read(ROOT / "ledger" / ledger.file_name(results.card))
        again = "python -m conformance ledger update"
        assert recorded.update(results) == (0, []), f"the ledger does not hold {path.name}; run: {again} {path}"


def test_results_name_no_path_of_the_machine_that_measured_them() -> None:
    for path in filter(Path.is_file, (ROOT / figures.RESULTS).rglob("*")):
        assert re.findall(r"/(?:root|home|tmp|work)/\S*", path.read_text(encoding="utf-8")) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the documents and what they are made of."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "ledger", tmp_path / "ledger")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_a_figure_that_changes_is_found(folder: Path) -> None:
    path = folder / figures.RESULTS / "steps" / "8x2048.json"
    content = json.loads(path.read_text())
    content["results"][0]["tokens_per_second"] *= 1.1
    path.write_text(json.dumps(content))
    for name in STATED:
        assert figures.rendered(text_of(name), folder) != text_of(name)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "<!-- figures: speeds a.json -->\n<!-- end -->\n",
            "figures: got 'speeds'; allowed: steps, utilisation, operations, ",
        ),
        ("<!-- figures: steps -->\n<!-- end -->\n", "figures: steps: got no file; allowed: files that exist"),
        ("<!-- figures: steps no.json -->\n<!-- end -->\n", "figures: steps: got no.json; allowed: files that exist"),
        ("<!-- figures: steps a.json -->\n1\n", "figures: got a block without <!-- end -->; allowed: "),
    ],
)
def test_a_block_without_a_source_is_an_error(block: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(figures.FiguresError, match="^" + re.escape(message)):
        figures.rendered(block, tmp_path)


def test_the_table_of_operations(tmp_path: Path) -> None:
    """Wrong results and our own are no contenders; without the time of a shape of ours there is no table."""
    fast = ROWS[0]
    others = [
        replace(fast, backend="torch", full=(0.4, 0.7, 0.8), device_full=(0.3, 0.36, 0.4)),
        replace(fast, backend="liger", full=(0.4, 0.6, 0.8), device_full=(0.3, 0.37, 0.4), note="writes over gate"),
        replace(fast, backend="unsloth", full=(0.1, 0.1, 0.1), red="gate G1"),
    ]
    (_, _, row) = figures.operations(bench_file(tmp_path / "bench.json", [fast, *others])).splitlines()
    assert row == "| swiglu small 4x64 | 0.350 | 0.360 torch | 92 / 86 | 0.500 | 0.600 liger, in place |"
    with pytest.raises(figures.FiguresError, match="swiglu small 4x64: got no correct time of fast"):
        figures.operations(bench_file(tmp_path / "wrong.json", [replace(fast, red="gate G1")]))


def test_the_table_of_budget_use(tmp_path: Path) -> None:
    recorded = ledger.Ledger("cpu")
    recorded.update(ledger.results_in(run_file(tmp_path / "run.json", backend="fast")))
    recorded.write(tmp_path / "cpu.json")
    assert figures.budget(tmp_path / "cpu.json").splitlines() == [
        "| operation, on cpu | float32 |",
        "|---|---|",
        "| rope | 31.2 % |",
    ]
