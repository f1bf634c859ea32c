"""Files of results as the verbs write them, and a parser of the page."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from conformance.backends import Judged
from conformance.bench.table import Row, write_json
from conformance.cli import main
from conformance.gate.job import Report
from conformance.gate.statistics import Decision, Verdict
from conformance.gate.verdict import properties, times
from conformance.mutate import report as mutate_report
from conformance.mutate.campaign import Outcome
from conformance.mutate.mutant import Mutant, SourceFile
from conformance.operations import Source
from conformance.reporting import report, results_file
from conformance.running.search import Result
from tests.judge.fake_card import RATES, STATE, FakeCard
from tests.judge.test_bench_shown import ROWS

MESSAGE = "gate G1 used 2.74 of the budget in output loss at index ()\nmeasured 7e-07, allowed 2.5e-07"
RESULTS = [
    Result("rope", "value", "float32", "pass", 0.312, 20),
    Result("rope", "value", "bfloat16", "fail", 2.74, 7, "rows=1 fill=randn seed=0", MESSAGE),
    Result("rope", "no_sync", "float32", "skip", message="needs a CUDA device"),
    Result(
        "rope", "memory", "float32", "xfail", None, 3, "rows=1 seed=0", "expected: it keeps a copy\nallocates 3 MiB"
    ),
    Result("swiglu", "metadata", "float32", "pass", None, 4),
    Result("pack", "nothing_lost", None, "pass", None, 9),
]


def judged(name: str = "mine.kernels") -> Judged:
    return Judged(name, {}, name)


def run_file(path: Path, results: list[Result] = RESULTS, backend: str = "mine.kernels", source: Any = None) -> Path:
    report.write_json(path, results, judged(backend), "cpu", "ci", source or Source())
    return path


def bench_file(path: Path, rows: list[Row] = ROWS) -> Path:
    write_json(path, rows, FakeCard(), RATES, STATE, {"cce": "cut-cross-entropy is not installed"})  # type: ignore[arg-type]
    return path


def mutate_file(path: Path, verdicts: tuple[str, ...] = ("killed", "survived", "equivalent"), line: int = 5) -> Path:
    """One mutant per verdict, each of another kind."""
    source = SourceFile("mine", Path("mine.py"), "mine.py", "a\n" * line + f"b < c  # {'long ' * 20}\n")
    edits = ((2 * line, 2 * line + 5, "b <= c"),)
    outcomes = []
    for kind, verdict in zip(("flipped", "compare", "constant"), verdicts, strict=True):
        mutant = Mutant(source, kind, line + 1, 0, "", edits, None)
        failed, reason = RESULTS[1:2] * (verdict == "killed"), "no fault" * (verdict == "equivalent")
        outcomes.append(Outcome("rope", mutant, verdict, tuple(failed), reason=reason))  # type: ignore[arg-type]
    mutate_report.write_json(
        path, outcomes, {"device": "cpu", "backend": "mine.kernels", "profile": "ci", "source": []}
    )
    return path


def coverage_file(path: Path) -> Path:
    missed = [{"pair": "kernel: SMOOTHING=True, SEGMENTS=4", "case": "tokens=3 seed=0"}]
    found = [result.as_dict() | {"coverage": 0.25, "missed": missed} for result in RESULTS[:1]]
    results_file.write(path, {"versions": {}, "device": "cpu", "backend": "fast", "profile": "ci"}, found)
    return path


SLOWER = "rope / 4x64 / bfloat16: device_full: SLOWER: 1.101 [1.080 1.120] times the base's; allowed: 1.020"


def gate_file(path: Path) -> Path:
    """Three regressions of rows and one that no row has; a shape of each verdict."""
    swiglu, passed = replace(RESULTS[0], op="swiglu"), replace(RESULTS[1], verdict="pass")
    rows = properties([swiglu.as_dict(), passed.as_dict()], [one.as_dict() for one in RESULTS[:2]])

    def time(shape: str, wrong: str | None = None, **found: Decision) -> None:
        row = replace(ROWS[0], op="rope", shape=shape, wrong=wrong).as_dict()
        rows.append(times(row, row, found))

    faster = Decision(Verdict.FASTER, 0.9, 0.88, 0.92, margin=0.02, rounds=9)
    time("4x64", device_full=Decision(Verdict.SLOWER, 1.101, 1.08, 1.12, margin=0.02, rounds=9))
    time("8x64", device_full=faster)
    time("2x64", wrong="gate G1", device_full=faster)
    time("1x64", full=replace(faster, verdict=Verdict.SAME, ratio=1.0))
    meta: dict[str, Any] = {"versions": {"torch": "2.11"}, "base": "0123456789abcdef", "head": "fedcba9876543210"}
    meta |= {"backend": "mine.kernels", "device": "cpu"}
    Report(rows, sentences=["the ledger has another card"], notes=["one host"], meta=meta).write(path)
    return path


def shown(output: Path, *arguments: Path | str) -> str:
    assert main(["report", *map(str, arguments), "-o", str(output)]) == 0
    return output.read_text(encoding="utf-8")


class Parsed(HTMLParser):
    """A page: its text, its attributes, the rows of its tables by caption; unclosed elements are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "wbr"):
            self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self.tables[self._caption][-1][-1] += data
