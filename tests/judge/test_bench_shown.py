"""The output of the bench: its table, its JSON, absent peers, pytest-benchmark."""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from conformance import backends, cli
from conformance.bench import conftest, exchange
from conformance.bench.playback import PlaybackTimer
from conformance.bench.plot import lacking, plot
from conformance.bench.sampler import Times
from conformance.bench.table import COLUMNS, NAME_WIDTH, Row, heading, text, write_json
from conformance.peers import Absent, import_kernels
from conformance.specs import specs
from conformance.verbs import bench as bench_verb
from tests.judge.fake_card import RATES, STATE, FakeCard
from tests.processes import PATIENCE

ROOT = Path(__file__).parents[2]

FAST = Row(
    op="swiglu",
    shape="small 4x64",
    dtype="bfloat16",
    backend="fast",
    forward=(0.1, 0.2, 0.3),
    full=(0.4, 0.5, 0.6),
    device_forward=(0.1, 0.15, 0.2),
    device_full=(0.3, 0.35, 0.4),
    device_backward=0.2,
    peak_mebibytes=12.0,
    error_use=0.31,
    roofline={"forward": 0.5, "full": 0.55, "device_forward": 0.92, "device_backward": 0.86},
)
ROWS = [
    FAST,
    replace(FAST, backend="liger", device_full=None, device_backward=None, wrong="gate G1", remark="writes over gate"),
    Row("swiglu", "small 4x64", "bfloat16", "reference", wrong="gate G2 used 3", failed=True),
]


def test_the_table() -> None:
    head, fast, liger, reference = text(ROWS).split("\n")
    assert head.split("  ")[0] == "swiglu small 4x64 bfloat16"
    shown = "fast 0.200 [0.100 0.300] 0.500 [0.400 0.600] 55 % 0.150 92 % 0.200 86 % 12 31 %"
    assert " ".join(fast.split()) == shown
    shown = "liger 0.200 [0.100 0.300] 0.500 [0.400 0.600] 55 % 0.150 92 % - 12 FAIL gate G1; writes over gate"
    assert " ".join(liger.split()) == shown
    assert reference.split(None, 1) == ["reference", "not timed: gate G2 used 3"]
    start = NAME_WIDTH
    for name, width in COLUMNS:
        assert head[start:].startswith(name)
        assert fast[start - 1] == " " != fast[start]
        start += width
    assert max(map(len, (head, fast))) < 170


def test_the_plot(tmp_path: Path) -> None:
    """The plot has a panel per shape, and shows times, shares of the roofline, and which results are wrong."""
    matplotlib = pytest.importorskip("matplotlib")
    file = tmp_path / "bench.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # texts, not outlines
        large = replace(FAST, shape="large 8x64", full=(1.0, 2.0, 3.0), roofline={})
        plot(file, [*ROWS, large, replace(FAST, shape="of a long name 4096x128256x4096 smoothing=0.1")], "Fake card")
    texts = {
        " ".join(element.itertext()).strip()
        for element in ElementTree.parse(file).iter()
        if element.tag.endswith("}text")
    }
    assert {"swiglu small 4x64 bfloat16", "swiglu large 8x64 bfloat16", "fast", "liger", "reference"} <= texts
    assert {"swiglu of a long name 4096x128256x4096", "smoothing=0.1 bfloat16"} <= texts  # in two lines
    assert {"0.500, 55 %", "0.500, 55 %  wrong", "not timed: gate G2 used 3", "2.000"} <= texts
    assert os.listdir(tmp_path) == ["bench.svg"]


def test_a_plot_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking(Path("bench.gif")) == "got bench.gif; allowed: a name that ends in .png, .svg, .pdf"
    monkeypatch.setattr("conformance.bench.plot.find_spec", lambda name: None)
    assert "matplotlib is not installed" in str(lacking(Path("bench.png")))


def test_the_heading_shows_the_card_and_its_rates() -> None:
    line = heading(FakeCard(), RATES, STATE)  # type: ignore[arg-type]
    assert line.startswith("Fake card, copy 4.00 TB/s, bf16 matmul 700 TFLOP/s, SM clock 1980 MHz\n")
    unknown = {"driver": None, "sm_clock_mhz": None}
    assert "SM clock" not in heading(FakeCard(), RATES, unknown)  # type: ignore[arg-type]


def test_the_json_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    write_json(file, ROWS, FakeCard(), RATES, STATE, {"liger": "it is absent"})  # type: ignore[arg-type]
    written = json.loads(file.read_text())
    assert {"versions", "gpu", "driver", "sm_clock_mhz", "copy_bytes_per_second", "absent", "commit"} <= set(
        written["meta"]
    )
    assert written["meta"]["gpu"] == "Fake card"
    fast = written["results"][0]
    assert fast["device_full"] == [0.3, 0.35, 0.4]
    assert fast["roofline"]["device_forward"] == 0.92
    assert "samples" not in fast


def test_an_absent_peer_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, device: str) -> None:
        if name == "liger":
            raise Absent("backend: liger needs the package liger-kernel, which is not installed")

    monkeypatch.setattr(backends, "load", load)
    line = "conformance: backend: liger needs the package liger-kernel, which is not installed"
    assert bench_verb._present(["fast", "liger", "fast"], "cpu")[0] == ["fast"]
    assert capsys.readouterr().err == f"{line}: skipped\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_verb, "Card", FakeCard)
    assert cli.main(["bench", "--backend", "liger"]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_missing_package_or_kernel_is_named() -> None:
    with pytest.raises(Absent, match="needs the package no-such-package, which is not installed"):
        import_kernels("no-such-package", "no_such_package:thing")
    with pytest.raises(Absent, match="has its package rich, but rich:no_such_thing cannot be imported"):
        import_kernels("rich", "rich:no_such_thing")
    there, missing = import_kernels("rich", "rich:get_console", "rich:no_such_thing")
    assert callable(there)
    for use in (lambda: missing.apply(1), lambda: missing(1)):
        with pytest.raises(ImportError, match="rich:no_such_thing cannot be imported"):
            use()


def test_importing_a_peer_leaves_the_compiler_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a peer prints while it is imported goes to stderr, not into a table."""
    code = "import torch._inductor.config as c; c.dce = not c.dce; print('hello')\ndef thing(): return c.dce"
    (tmp_path / "meddling_peer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    before = torch._inductor.config.dce
    (thing,) = import_kernels("meddling-peer", "meddling_peer:thing")
    assert thing() == torch._inductor.config.dce == before
    assert capsys.readouterr() == ("", "hello\n")


def test_stored_times_name_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored time without its card could be a baseline for a run on another card."""
    monkeypatch.setattr(conftest, "the_card", lambda: (FakeCard(), RATES, STATE))
    info: dict[str, Any] = {}
    conftest.pytest_benchmark_update_machine_info(None, info)  # type: ignore[arg-type]
    assert {"torch", "triton", "cuda"} <= set(info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    conftest.pytest_benchmark_update_machine_info(None, info)  # type: ignore[arg-type]
    assert info["gpu"] == "Fake card"
    assert info["driver"] == "1.2"
    assert "sm_clock_mhz" not in info  # it differs in every run, and each difference causes a warning


STORED = """
import pytest
from conformance.bench.playback import PlaybackTimer
from conformance.bench.sampler import Times

TIMER = PlaybackTimer()


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("scale", [1, 2])
def test_recorded(benchmark, scale):
    TIMER.play(benchmark, Times(tuple(scale * (0.1 + 0.01 * n) for n in range(21))))
"""


def test_pytest_benchmark_stores_the_samples(tmp_path: Path) -> None:
    """pytest-benchmark's statistics are those of the recorded milliseconds."""
    (tmp_path / "test_stored.py").write_text(STORED)
    python = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*python, "-c", "/dev/null", "--benchmark-json=out.json", "test_stored.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, textwrap.indent(done.stdout + done.stderr, "  ")
    stats = [benchmark["stats"] for benchmark in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert [s["rounds"] for s in stats] == [21, 21]
    assert [s["median"] for s in stats] == [pytest.approx(0.2e-3), pytest.approx(0.4e-3)]
    assert [s["min"] for s in stats] == [pytest.approx(0.1e-3), pytest.approx(0.2e-3)]


def test_the_bench_writes_what_pytest_benchmark_reads(tmp_path: Path) -> None:
    """The file has pytest-benchmark's statistics and the names of test_speed.py; its `compare` shows two of them."""
    for file, scale in (("0001_then.json", 1), ("0002_now.json", 2)):
        samples = {"full": Times(tuple(scale * (0.4 + 0.01 * n) for n in range(21)))}
        rows = [replace(FAST, samples=samples), replace(FAST, backend="liger", samples=samples, failed=True), ROWS[2]]
        exchange.write(tmp_path / file, rows, FakeCard(), STATE)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "0001_then.json").read_text())
    assert written["machine_info"]["gpu"] == "Fake card"
    (benchmark,) = written["benchmarks"]
    assert benchmark["fullname"] == "conformance/bench/test_speed.py::test_speed[swiglu-small-bfloat16-fast-full]"
    assert benchmark["group"] == "swiglu small 4x64 bfloat16 full"
    assert benchmark["extra_info"]["peak_mebibytes"] == 12.0
    assert (benchmark["stats"]["rounds"], benchmark["stats"]["median"]) == (21, pytest.approx(0.5e-3))
    code = "from pytest_benchmark.cli import main; main()"
    command = [sys.executable, "-c", code, "compare", "0001_then.json", "0002_now.json", "--columns=median"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = dict(re.findall(r"^test_speed\[swiglu-small-bfloat16-fast-full\] \((\w+)\) +(.*?)\s*$", done.stdout, re.M))
    assert {file: cell.split()[0] for file, cell in shown.items()} == {
        "0001_then": "500.0000",
        "0002_now": "1,000.0000",
    }
    assert "benchmark 'swiglu small 4x64 bfloat16 full': 2 tests" in done.stdout


def test_the_bench_writes_what_github_action_benchmark_reads(tmp_path: Path) -> None:
    """Its tool "pytest" takes the full name, calls per second, their deviation, the mean and the rounds of each."""
    pytest.importorskip("pytest_benchmark")
    for times in (Times((0.5,)), Times((0.4, 0.5, 0.6))):
        exchange.write(tmp_path / "now.json", [replace(FAST, samples={"full": times})], FakeCard(), STATE)  # type: ignore[arg-type]
        (benchmark,) = json.loads((tmp_path / "now.json").read_text())["benchmarks"]
        stats = benchmark["stats"]
        assert benchmark["fullname"].endswith("test_speed[swiglu-small-bfloat16-fast-full]")
        assert (stats["ops"], stats["mean"]) == (pytest.approx(2000), pytest.approx(0.5e-3))
        assert (stats["stddev"], stats["rounds"]) == (
            pytest.approx(1e-4 * (len(times.samples) > 1)),
            len(times.samples),
        )


def test_no_two_rows_have_one_name_in_a_file_of_pytest_benchmark(tmp_path: Path) -> None:
    """Names of shapes can begin alike and have several words; pytest-benchmark compares by name."""
    pytest.importorskip("pytest_benchmark")
    samples = {kind: Times((0.4,) * 5) for kind in exchange.KINDS}
    shapes = [(op, shape) for op, spec in specs().items() for shape in spec.speed.shapes]
    dtypes = ("bfloat16", "float32")
    rows = [Row(op, f"{shape} 8x64 mode=sum", dt, "fast", samples=samples) for op, shape in shapes for dt in dtypes]
    exchange.write(tmp_path / "now.json", rows, FakeCard(), STATE)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "now.json").read_text())["benchmarks"]
    names = [f"test_speed[{op}-{shape}-{dt}-fast-{kind}]" for op, shape in shapes for dt in dtypes for kind in
             exchange.KINDS]  # fmt: skip
    assert [one["name"] for one in written] == names
    assert len(set(names)) == len(names)


def test_a_file_of_pytest_benchmark_needs_its_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(exchange, "find_spec", lambda name: None)
    assert cli.main(["bench", "--benchmark-json", "out.json"]) == 2
    assert capsys.readouterr().err.startswith("conformance: --benchmark-json: needs pytest-benchmark, which is not")


def test_the_playback_timer_advances_only_by_samples() -> None:
    timer = PlaybackTimer()
    assert timer() == timer() == 0.0  # no samples
