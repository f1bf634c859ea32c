"""`conformance report`: what verbs write is shown whole, escaped, and with commands that reproduce; usage errors."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conformance.bench.table import Row
from conformance.cli import main
from conformance.operations import Source
from conformance.reporting import report
from conformance.running.search import Result
from tests.judge.shown import (
    MESSAGE,
    RESULTS,
    Parsed,
    bench_file,
    coverage_file,
    gate_file,
    mutate_file,
    run_file,
    shown,
)
from tests.judge.test_bench_shown import ROWS
from tests.processes import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
FRAME = Path(__file__).with_name("frame.html")  # shows the page in a frame and measures it
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'> & @somebody ``` `|` \x1b[31m\ud800"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One file of each kind, as the verbs write them."""
    made = (run_file, bench_file, mutate_file, coverage_file, gate_file)
    return [make(tmp_path / f"{make.__name__}.json") for make in made]


def test_the_page_shows_every_kind(tmp_path: Path, files: list[Path]) -> None:
    page = Parsed(shown(tmp_path / "page.html", *files))
    verdicts = page.tables["Verdicts by operation and dtype"]
    assert verdicts[0][:3] == ["operation", "float32", "bfloat16"]
    assert ["rope", "k 1 known 31.2 %", "✗ 1 failed 274 %", "0/2", "30", "-"] in verdicts
    assert ["pack", "✓ ok", "", "1/1", "9", "-"] in verdicts
    heat = page.tables["Budget use by property, operation and dtype"]
    assert [heat[0], heat[1]] == [["property", "rope", "swiglu"], ["f32", "bf16", "f32"]]
    assert heat[2:6] == [
        ["metadata", "", "", "✓"],
        ["value", "31", "✗", ""],
        ["no_sync", "-", "", ""],
        ["memory", "k", "", ""],
    ]
    assert ["known deviation", "rope / memory / float32", "it keeps a copy"] in page.tables["Not judged, or known"]
    assert ["skipped 1 times", "no_sync", "needs a CUDA device"] in page.tables["Not judged, or known"]
    (fast, liger, reference) = page.tables["small 4x64, bfloat16"][1:]
    assert fast[:3] == ["fast fastest call", "0.200 [0.100 0.300] 50 %", "0.500 [0.400 0.600] 55 %"]
    assert liger[-2:] == ["✗ wrong", "gate G1; writes over gate"]
    assert reference == ["reference ", "not timed: gate G2 used 3"]
    assert ["compare", "·", "·", "✗ 1", "·", "·", "·"] in page.tables["Mutants by kind of fault"]
    assert ["kernel: SMOOTHING=True, SEGMENTS=4", "tokens=3 seed=0"] in page.tables["Not run"]
    times = page.tables["Times of the head divided by those of the base, with their intervals"]
    assert times[:2] == [
        ["shape", "verdict", "device_full", "full"],
        ["rope / 4x64 / bfloat16", "SLOWER", "1.101 [1.080 1.120]", "-"],
    ]
    assert ["✗ regressed", "swiglu", "is lost: it was defined before"] in page.tables["Changes against the base"]
    for text in (MESSAGE, "Note: one host", "+b <= c", "cut-cross-entropy is not installed", "Kill rate 50 %"):
        assert text in page.words


def test_the_page_needs_no_network_and_no_script(tmp_path: Path, files: list[Path]) -> None:
    text = shown(tmp_path / "page.html", *files)
    page = Parsed(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.names)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    ids = {value for name, value in page.attributes if name == "id"}
    assert {value for name, value in page.attributes if name in ("href", "src")} <= {f"#{name}" for name in ids}
    assert not re.search(r"https?:|url\(|@import|\son\w+=", text)


@pytest.mark.parametrize("suffix", [".html", ".md", ".xml"])
def test_everything_is_escaped(tmp_path: Path, suffix: str) -> None:
    results = [Result(EVIL, EVIL, EVIL, verdict, 0.5, 1, EVIL, EVIL) for verdict in ("fail", "skip", "xfail")]  # type: ignore[arg-type]
    rows = [Row(EVIL, EVIL, EVIL, EVIL, wrong=EVIL, remark=EVIL, failed=True), replace(ROWS[0], op=EVIL, backend=EVIL)]
    files = [run_file(tmp_path / "run.json", results, EVIL), bench_file(tmp_path / "bench.json", rows)]
    text = shown(tmp_path / f"out{suffix}", *files)
    if suffix == ".html":
        page = Parsed(text)
        assert not {"script", "img"} & set(page.names)
        assert not any(name.startswith("on") for name, _ in page.attributes)
    elif suffix == ".xml":
        assert "alert(1)" in ElementTree.fromstring(text.encode())[0].get("name", "")
    else:
        assert not re.search("<(script|img)|@somebody", without_code(text))
    assert "\x1b" not in text
    assert "\N{REPLACEMENT CHARACTER}" in text


def without_code(text: str) -> str:
    """Markdown without its fences and code spans."""
    text = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize("suffix", [".html", ".md", ".xml"])
def test_the_command_is_the_one_that_the_run_prints(tmp_path: Path, suffix: str) -> None:
    source = Source(reference="torch.nn.functional:softsign", example="input=randn(4)")
    printed = report.failures(RESULTS[1:2], "mine.kernels", "cpu", source)
    command = printed.partition("reproduce:")[2].strip()
    text = shown(tmp_path / f"out{suffix}", run_file(tmp_path / "run.json", source=source))
    if suffix == ".xml":
        assert f"reproduce: {command}" in "".join(ElementTree.fromstring(text.encode()).itertext())
    else:
        assert (
            command in (Parsed(text).words if suffix == ".html" else text).split("\n") or command in Parsed(text).words
        )


def test_junit(tmp_path: Path, files: list[Path]) -> None:
    root = ElementTree.fromstring(shown(tmp_path / "out.xml", *files).encode())
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuites", "20", "6")
    rope = root[0]
    assert dict(rope.attrib) == {
        "name": "Run of mine.kernels on cpu: rope", "tests": "4", "failures": "1", "errors": "0", "skipped": "2",
    }  # fmt: skip
    assert [case.get("name") for case in rope] == [
        "value[float32]",
        "value[bfloat16]",
        "no_sync[float32]",
        "memory[float32]",
    ]
    assert {case.get("classname") for case in rope} == {"mine.kernels.rope"}
    assert [[child.tag for child in case] for case in rope] == [[], ["failure"], ["skipped"], ["skipped"]]
    assert rope[1][0].get("message") == MESSAGE.partition("\n")[0]
    assert rope[2][0].get("message") == "needs a CUDA device"


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (None, "it cannot be read: No such file"),
        ("", "got no JSON"),
        ("not json", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ('{"meta": {}, "results": [{"budget_use": NaN}]}', "got NaN; allowed: finite numbers"),
        ("[]", 'got JSON without "meta" and "results"'),
        ('{"meta": {}, "results": []}', "got no results"),
        ('{"meta": {}, "results": [7]}', "got results of no known kind"),
        ('{"meta": {}, "results": [{"colour": "red"}]}', "got results of no known kind"),
        ('{"meta": {}, "results": [{"property": "value"}]}', 'result 1: got no "op"'),
        ('{"meta": {}, "results": [{"property": "value", "op": "rope", "verdict": "good"}]}', 'verdict: got "good"'),
        ('{"meta": {"not_defined": 3}, "results": []}', "meta, not_defined: got 3"),
        ('{"meta": {"not_defined": [], "schema": 1}, "results": []}', "meta, schema: got 1"),
        ('{"meta": {"not_defined": []}, "results": [], "x": 1e999}', ""),
        ('{"meta": {"kill_rate": 1e999}, "results": []}', "kill_rate: got inf"),
        ('{"meta": {"kill_rate": 1' + "0" * 400 + '}, "results": []}', "kill_rate: got a number too large"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, seen: str) -> None:
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    status = main(["report", str(file), "-o", str(tmp_path / "out.html")])
    printed = capsys.readouterr().err
    if not seen:
        assert status == 0
        return
    assert status == 2
    assert printed.count("\n") == 1
    assert printed.startswith(f"conformance: report: {file}: ")
    assert seen in printed
    assert (
        "allowed: a file that --json of bench, coverage, gate, mutate, run wrote, or one of pytest-benchmark" in printed
    )
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ((), "FILE"),
        (("run.json", "--format", "pdf"), "'html', 'markdown', 'junit'"),
        (("run.json", "--base", "run.json", "--format", "junit"), "allowed: html, markdown"),
        (("run.json", "-o", "/dev/null/x.html"), "--output: got /dev/null/x.html; it cannot be written"),
        (("run.json", "-o", "run.json"), "--output: got run.json, a file of results"),
        ((str(Path(__file__).parents[2] / "ledger" / "cpu.json"),), "cpu.json: got a ledger; allowed: after --history"),
    ],
)
def test_usage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Any, seen: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = run_file(Path("run.json")).read_text()
    assert main(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert seen in printed.err
    assert Path("run.json").read_text() == before


def test_the_format_follows_the_suffix_and_goes_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_file(tmp_path / "run.json")
    for options, begin in (
        ([], "<!doctype html>"),
        (["--format", "markdown"], "## "),
        (["--format", "junit"], "<?xml"),
    ):
        assert main(["report", str(file), *options]) == 0
        assert capsys.readouterr().out.startswith(begin)
    assert shown(tmp_path / "out.txt", file).startswith("<!doctype html>")


def test_forty_operations_fit_on_paper(tmp_path: Path) -> None:
    """The heat map is split into tables that are not cut off at the edge of a sheet; each operation is in one."""
    ops = [f"operation_{number:02}" for number in range(40)]
    dtypes = ("float32", "float16", "bfloat16")
    results = [Result(op, "value", dtype, "pass", 0.5, 3) for op in ops for dtype in dtypes]
    page = Parsed(shown(tmp_path / "page.html", run_file(tmp_path / "run.json", results)))
    captions = [f"Budget use by property, operation and dtype ({place} of 4)" for place in range(1, 5)]
    heads = [page.tables[caption][0][1:] for caption in captions]
    assert [op for head in heads for op in head] == ops
    assert {len(head) for head in heads} == {10}
    assert all(page.tables[caption][2] == ["value", *["50"] * 30] for caption in captions)


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_a_file_in_which_nothing_was_judged_is_no_success(tmp_path: Path, suffix: str) -> None:
    for results in ([], RESULTS[2:3]):  # without a check, and with one that was skipped
        text = shown(tmp_path / f"out{suffix}", run_file(tmp_path / "run.json", results))
        assert "nothing was judged" in text
        assert not re.search("[✓✅] nothing", text)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(tmp_path: Path, files: list[Path], dark: bool) -> None:
    """The page fits phones, its parts unfold, its texts stand out from the background, its plot has its points."""
    text = shown(tmp_path / "page.html", *files, "--base", files[0])
    host = tmp_path / "host.html"
    script = FRAME.read_text(encoding="utf-8").replace("PAGE", json.dumps(text).replace("</", "<\\/"))
    host.write_text(script, encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", "--headless", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--virtual-time-budget=5000", f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
    command = [str(CHROMIUM), *options, host.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    found = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["wide"] == []
    assert found["keyless"] == []  # what scrolls sideways on a phone does so with the keyboard too
    assert found["folded"] == found["unfolded"] > 0
    assert found["texts"] > 100
    assert found["faint"] == []
    assert found["marks"] == 2  # fast, and liger with its wrong result
    assert (found["background"] == "rgb(255, 255, 255)") == (not dark)
