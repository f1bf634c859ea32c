"""Every figure of README.md and docs/ comes from docs/results, the ledgers, or a test that derives it."""

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.bench.measure import READING, UNTHROTTLED
from conformance.gate import ledger, statistics, verdict
from conformance.gate.ledger import CLOCK, SHARE_FALL, TIME_RISE
from conformance.page.compare import FACTOR
from conformance.verbs.model import TIMEOUT_SECONDS
from docs import figures
from examples import step_benchmark
from tests.judge.shown import bench_file, run_file
from tests.judge.test_bench_shown import ROWS

ROOT = figures.ROOT
AGAIN = "; run: make figures"
HELD = re.compile(r"^<!-- held by (\S+) -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
# What tests.judge.power writes: a part of a document, and a whole one. Its own tests compare them with its files.
POWER = re.compile(
    r"^<!-- measured by tests.judge.power -->$.*?^<!-- end of what is measured -->$", re.MULTILINE | re.DOTALL
)
POWERS = "docs/judge-power.md"
BETWEEN = r"(?:[ \u00a0\u202f*-]|&nbsp;)"
WORD = r"(?:two|three|four|five|six|seven|eight|nine|ten|twenty|dozens?|hundreds?|thousands?)"
COUNT = rf"(?<![\w.])(?:\d+(?:[.,]\d+)*(?:e[+-]?\d+)?k?{BETWEEN}*|{WORD}{BETWEEN}+(?:of )?)"
WHAT = r"(?:tok(?:en)?s?|samples?|documents?|rows?|steps?|it(?:eration)?s?)"
AMOUNTS = [
    r"[munµμ]?s", r"(?:milli|micro|nano)?sec(?:ond)?s?", r"min(?:ute)?s?", r"h(?:ou)?rs?", r"h", r"days?",
    r"[KMGTP]i?B(?:/s)?", r"(?:kilo|mega|giga|tera|kibi|mebi|gibi|tebi)bytes?",
    rf"{WHAT}(?:/s| per second| a second)", r"[MGTP]FLOPs?(?:/s)?", r"(?:mega|giga|tera|peta)flops?",
    r"%", r"per ?cent", r"percentage points?", r"[MG]?Hz", r"W", r"fold", r"budgets", r"[x\u00d7](?! ?\d| [TVH] )",
]  # fmt: skip
PART = r"(?:half|(?:a|one|two) (?:third|quarter|fifth|sixth|eighth|tenth)s?)"
RATIOS = [
    r"\d ?times(?![\w/])",
    rf"(?:{COUNT}times|twice|half|double) (?:as (?:much|fast|slow|long|many)|faster|slower|longer|less|more|the|its)\b",
    r"factor of (?:\d|two|three|four|five|ten)",
    r"speed-?ups? (?:of |is |by )?\d",
    rf"\b{PART}(?: of)? (?:the|its|their) (?:time|memory|speed|budget|peak)\b",
]
UNITS = re.compile("|".join([rf"{COUNT}(?:{'|'.join(AMOUNTS)})(?!\w)", *RATIOS]), re.IGNORECASE)
# The blocks that a document must have.
STATED = {
    "README.md": {"steps"},
    "docs/benchmarks.md": {"measured", "operations", "budget", "fingerprints", "step", "sizes"},
}
BOUNDS = "docs/judge.md"  # its table of bounds is compared with what is measured by tests/judge/test_condition.py
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
DOCUMENTS = [*figures.documents(), *(ROOT / name for name in OTHERS)]
NAMES = [name for path in DOCUMENTS if (name := path.relative_to(ROOT).as_posix()) != POWERS]
# Quantities that are limits, and no results: what the code has, where it has them.
LIMITS = {
    "README.md": ["FAIL 3.68e+07 %"],  # printed by a run; tests/house/test_documents.py runs it again
    "docs/adding.md": ["not 0.45 to 2 times that of the spec"],
    "docs/benchmarks.md": [
        "[20 %, 80 %] quantiles",
        f"less than the bytes need at {READING} times",
        f"need at {UNTHROTTLED} times the measured rate",
    ],
    "docs/gate.md": [
        f"more than {100 * verdict.MEMORY_RISE:g} % and {verdict.MEMORY_STEP:g} MiB",
        "noise or 2 %",
        f"may rise; {verdict.BUDGET_RISE:g} of the error budget by default",
        f"falls by more than {verdict.COVERAGE_FALL:g}",
        f"grow by more than {'a quarter' if verdict.RESOURCE_RISE == 0.25 else verdict.RESOURCE_RISE}",
        f"after {', '.join(map(str, statistics.LOOKS[:-1]))} and {statistics.LOOKS[-1]} rounds",
        f"in at most 1 of {1 / statistics.LEVEL:.0f} comparisons",
        f"at least {statistics.LOOKS[0]} rounds",
        f"*margin* is {statistics.MARGIN} times",
        f"at least {100 * statistics.FLOOR:g} %",
        f"{100 * statistics.EXPECTED['device']:g} % for times without launches and",
        f"{100 * statistics.EXPECTED['host']:g} % for times with them",
        f"an SM clock within {100 * CLOCK:g} %",
        f"Times may be {100 * (TIME_RISE - 1):.0f} % longer",
        f"Shares may be {100 * (1 - SHARE_FALL):.0f} % lower",
    ],
    "docs/judge.md": ["y=randn(T,2*H)", "with 64 GiB of free GPU memory", "100 % is the whole budget"],
    "docs/judge-models.md": [f"{TIMEOUT_SECONDS // 3600} hours for a model that is loaded"],
    "docs/report.md": [
        "--factor of 1",
        f"by this factor; {FACTOR:g} by default",
        "a tenth of the budget",
        "20 % and 80 % quantiles",
        "20 % quantile and the base's 80 % quantile",
    ],
    "docs/training.md": ["after 16 times as many batches", "nearly four times as much"],
}


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


def unrendered(name: str) -> str:
    """A document without its blocks and what runs: a span of code and what a command printed can state a figure."""
    text = figures.BLOCK.sub("", POWER.sub("", HELD.sub("", text_of(name))))
    assert "<!-- " not in text
    return re.sub(r"^```(?!text$).*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).replace("`", "")


@pytest.mark.parametrize("name", NAMES)
def test_no_measured_quantity_stands_outside_of_a_block(name: str) -> None:
    left = " ".join(unrendered(name).split())
    for limit in LIMITS.get(name, ()):
        assert limit in left, f"{name} does not state {limit!r}"
        left = left.replace(limit, "")
    assert [left[max(0, one.start() - 40) : one.end()] for one in UNITS.finditer(left)] == []


@pytest.mark.parametrize(
    "words",
    [
        "takes 0.14 ms",
        "in about 20 s,",
        "9 us;",
        "83 500 tokens/s",
        "15.9 GiB instead",
        "1.4 times as fast",
        "5 % less",
        "140 µs",
        "12.5 milliseconds",
        "five seconds",
        "10 sec",
        "takes **12** ms",
        "12&nbsp;ms",
        "12-ms steps",
        "12 ms/step",
        "2 days",
        "16 gigabytes",
        "2.1 TiB",
        "3 kB",
        "900 TFLOPS",
        "1.2 PFLOP/s",
        "900 teraflops",
        "88k tokens/s",
        "88.2k tok/s",
        "88,200 tokens a second",
        "88 200 tokens per second",
        "3 samples/s",
        "120 it/s",
        "50 per cent",
        "5 percentage points",
        "1980 MHz",
        "twice as fast",
        "three times faster",
        "2x faster",
        "1.5\u00d7 as fast",
        "2.3-fold",
        "a factor of 3 faster",
        "up to a factor of two",
        "a speedup of 1.8",
        "half the memory",
        "a third of the time",
        "a fifth to a half of the budget",
        "thousands of budgets",
    ],
)
def test_a_measured_quantity_is_found(words: str) -> None:
    assert UNITS.search(words)


@pytest.mark.parametrize("words", ["4 states", "of 64 tokens", "2^31 elements", "8 x 2048", "16 bits", "torch 2.10"])
def test_a_size_is_no_measured_quantity(words: str) -> None:
    assert not UNITS.search(words)


@pytest.mark.parametrize("name", [name for name in NAMES if name != BOUNDS])
def test_no_table_of_numbers_stands_outside_of_a_block(name: str) -> None:
    cells = [cell.strip() for line in unrendered(name).splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [cell for cell in cells if re.fullmatch(r"[\d.][\d.,/ ]*\w*", cell)] == []


def test_what_holds_other_figures_is_a_test_that_reads_them() -> None:
    for path in DOCUMENTS:
        for test in HELD.findall(path.read_text(encoding="utf-8")):
            words = (f"<!-- held by {test} -->", f'"{path.name}"', "def demand_held(")  # tried on changed numbers
            assert [one for one in words if one not in text_of(test)] == []


def test_every_file_of_results_is_shown() -> None:
    """By a block that is made of it; those of tests.judge.power are read by its tests."""
    names = {file for block in figures.BLOCK.findall(text_of("docs/benchmarks.md")) for file in block[0].split()[1:]}
    shown = {path for name in names for path in ROOT.glob(name)}
    found = {path for path in (ROOT / figures.RESULTS).rglob("*.json") if path.parent.name != "power"}
    assert found - shown == set()
    assert set((ROOT / "ledger").glob("*.json")) - shown == set()


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
            "figures: got 'speeds'; allowed: steps, step, sizes, operations, ",
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
        replace(fast, backend="liger", full=(0.4, 0.6, 0.8), device_full=(0.3, 0.37, 0.4), remark="writes over gate"),
        replace(fast, backend="unsloth", full=(0.1, 0.1, 0.1), wrong="gate G1"),
    ]
    (_, _, row) = figures.operations(bench_file(tmp_path / "bench.json", [fast, *others])).splitlines()
    assert row == "| swiglu small 4x64 | 0.350 | 0.360 torch | 92 / 86 | 0.500 | 0.600 liger, in place | 12 |"
    with pytest.raises(figures.FiguresError, match="swiglu small 4x64: got no correct time of fast"):
        figures.operations(bench_file(tmp_path / "wrong.json", [replace(fast, wrong="gate G1")]))


def test_the_table_of_budget_use(tmp_path: Path) -> None:
    recorded = ledger.Ledger("cpu")
    recorded.update(ledger.results_in(run_file(tmp_path / "run.json", backend="fast")))
    recorded.write(tmp_path / "cpu.json")
    assert figures.budget(tmp_path / "cpu.json").splitlines() == [
        "| operation, on cpu | float32 |",
        "|---|---|",
        "| rope | 31.2 % |",
    ]


def contender(who: str, tokens_per_second: float, **changes: Any) -> dict[str, Any]:
    found = {"who": who, "what": f"trainer {who}", "tokens_per_second": tokens_per_second, "step_ms": 49.4}
    found |= {"peak_gib": 6.54, "teraflops": 400.0, "idle_share": 0.0449, "losses": [12.0, 11.5], "kernels": None}
    return found | changes


def steps_file(path: Path, results: list[dict[str, Any] | None], **changes: Any) -> Path:
    """A file as the step benchmark writes it."""
    chosen = {"shape": "llama-3.2-1b", "rows": 2, "length": 2048, "mode": "lora", "gpus": 1, "json": path}
    step_benchmark.write(Namespace(**chosen | changes), "NVIDIA H200", 800.0, results)
    return path


def test_the_tables_of_steps(tmp_path: Path) -> None:
    """Each kind of weights has a row, beside the fastest other trainer with such weights."""
    small = [contender("fast", 80e3), None, contender("liger-varlen", 30e3), contender("unsloth", 20e3)]
    four = [contender("fast-4bit", 70e3, peak_gib=5.0), contender("unsloth-4bit", 35e3)]
    path = steps_file(tmp_path / "new" / "small.json", [*small, *four])
    long = steps_file(tmp_path / "long.json", [contender("fast", 60e3)], rows=1, length=32768, mode="gc", gpus=2)
    assert figures.step(path).splitlines()[2:4] == [
        "| trainer fast | 49 | 80.0 | 6.5 | 50 | 4 |",
        "| trainer fast-4bit | 49 | 70.0 | 5.0 | 50 | 4 |",
    ]
    assert figures.sizes(path, long).splitlines()[2:] == [
        "| llama-3.2-1b, 1 x 32768, checkpointing, 2 GPUs | 60.0 | 6.5 | 50 | 4 | |  | |  |",
        "| llama-3.2-1b, 2 x 2048 | 80.0 | 6.5 | 50 | 4 | liger-varlen | 30.0 | 6.5 | 2.67 |",
        "| llama-3.2-1b, 2 x 2048, 4-bit weights | 70.0 | 5.0 | 50 | 4 | unsloth-4bit | 35.0 | 6.5 | 2.00 |",
    ]
    assert figures.steps(path, long).splitlines()[2:] == ["| trainer fast | 80.0 | 6.5 | 60.0 | 6.5 |"]


def test_a_file_of_steps_follows_its_schema(tmp_path: Path) -> None:
    path = steps_file(tmp_path / "steps.json", [contender("fast", 80e3, peak_gib="6")])
    with pytest.raises(figures.FiguresError, match=r"steps.json: file.results\[0\].peak_gib: got '6'; allowed: number"):
        figures.step(path)
    path.write_text("{")
    with pytest.raises(
        figures.FiguresError, match=r"steps.json: got no JSON .*; allowed: what examples/step_benchmark"
    ):
        figures.step(path)


def test_files_of_the_same_card_versions_and_commit_have_one_row(tmp_path: Path) -> None:
    first = bench_file(tmp_path / "a.json", ROWS)
    content = json.loads(first.read_text())
    content["meta"]["copy_bytes_per_second"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(content))
    (row,) = figures.measured(first, tmp_path / "b.json").splitlines()[2:]
    assert row.startswith("| `a.json`, `b.json` | ") and re.search(r"copy [\d.]+ to [\d.]+ TB/s, matrix product", row)


def test_the_table_of_fingerprints(tmp_path: Path) -> None:
    kernel = {"op": "rope", "shape": "small", "dtype": "bfloat16", "kernel": "rope_kernel", "problem": None}
    kernel |= {"registers": 40, "stack": 0, "shared": 0, "load": 16, "store": 16}
    prints = [kernel | {"target": "sm_80"}, kernel | {"target": "sm_90", "registers": 38, "stack": 8}]
    prints.append(kernel | {"target": "sm_80", "kernel": "rope_backward_kernel", "registers": 64})
    recorded = ledger.Ledger("cpu")
    recorded.update(ledger.results_of({"versions": {"triton": "3.9"}, "backend": "fast"}, prints))
    recorded.write(tmp_path / "cpu.json")
    assert figures.fingerprints(tmp_path / "cpu.json").splitlines() == [
        "| | sm_80 | sm_90 |",
        "|---|---|---|",
        "| rope | 64 | 38 + 8 |",
    ]
