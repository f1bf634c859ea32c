"""`conformance report --base`: which change is which, and the comment of a pull request within GitHub's limit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conformance.gate.job import Report
from conformance.gate.verdict import properties
from conformance.page import compare
from conformance.page.reading import read
from conformance.running.search import Result
from tests.judge.shown import MESSAGE, RESULTS, SLOWER, Parsed, bench_file, gate_file, mutate_file, run_file, shown
from tests.judge.test_bench_shown import ROWS


def with_verdict(verdict: str | None, used: float | None = None) -> list[Result]:
    """A result that passes, so that a file is never empty, and perhaps one more."""
    one = Result("rope", "gradients", "float32", verdict, used, 1, None, None)  # type: ignore[arg-type]
    return [RESULTS[0], *([one] if verdict else [])]


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (("pass",), ("fail",), "regressed"),
        (("fail",), ("pass",), "improved"),
        (("xfail",), ("fail",), "regressed"),
        (("fail",), ("xfail",), "improved"),
        (("pass",), ("skip",), "skipped"),
        (("fail",), ("skip",), "skipped"),
        (("pass",), (None,), "skipped"),
        (("skip",), ("pass",), "new"),
        ((None,), ("pass",), "new"),
        ((None,), ("fail",), "regressed"),
        (("skip",), ("fail",), "regressed"),
        (("skip",), (None,), None),
        ((None,), ("skip",), None),
        (("fail",), ("fail",), None),
        (("pass", 0.3), ("pass", 0.39), None),
        (("pass", 0.3), ("pass", 0.5), "regressed"),
        (("pass", 0.5), ("pass", 0.3), "improved"),
        (("pass", None), ("pass", 0.5), None),
    ],
)
def test_a_verdict_that_gets_worse_is_a_regression(tmp_path: Path, before: Any, now: Any, word: str | None) -> None:
    files = [read(run_file(tmp_path / "run.json", with_verdict(*one))) for one in (before, now)]
    found = compare.changes(files[1:], files[:1])
    assert [change.word for change in found] == ([word] if word else [])
    assert all(change.name == "rope / gradients / float32" for change in found)


def test_budget_use_is_unsure_where_cases_or_versions_differ(tmp_path: Path) -> None:
    before, now = (read(run_file(tmp_path / "run.json", with_verdict("pass", used))) for used in (0.3, 0.9))
    for meta in ({"profile": "gpu"}, {"gpu": "Fake card"}, {"versions": {"torch": "9"}}):
        other = replace(before, meta=replace(before.meta, **meta))
        (change,) = compare.changes([now], [other])
        assert change.word == "unsure"
        assert "against" in change.text


def test_files_are_compared_with_their_like(tmp_path: Path) -> None:
    ours, theirs = (read(run_file(tmp_path / "run.json", RESULTS[:1], name)) for name in ("mine", "reference"))
    assert compare.changes([ours, theirs], [theirs, ours]) == []
    assert [change.word for change in compare.changes([ours], [theirs])] == ["skipped", "new"]
    assert compare.changes([], []) == []


@pytest.mark.parametrize(
    ("now", "clocks", "word"),
    [
        ((0.99, 1.0, 1.01), 1.0, None),
        ((0.97, 1.0, 1.03), 1.0, None),  # a change by 5 % is excluded
        ((0.90, 1.0, 1.10), 1.0, "unsure"),
        ((1.09, 1.1, 1.11), 1.0, "regressed"),
        ((0.89, 0.9, 0.91), 1.0, "improved"),
        ((1.09, 1.1, 1.11), 1.2, "unsure"),  # the clock was that much slower
        ((1.02, 1.1, 1.20), 1.0, "regressed"),
    ],
)
def test_a_longer_time_is_a_regression_unless_noise_or_the_clock_explains_it(
    now: tuple[float, float, float], clocks: float, word: str | None
) -> None:
    assert compare.timing(now, (0.99, 1.0, 1.01), clocks, compare.FACTOR) == word


def test_a_slower_row_is_a_regression_on_the_same_card_alone(tmp_path: Path) -> None:
    base = read(bench_file(tmp_path / "bench.json"))
    slow = replace(ROWS[0], device_full=(0.7, 0.75, 0.8))
    now = replace(base, rows=(slow, *base.rows[1:]))
    (change,) = compare.changes([now], [base])
    assert (change.word, change.text) == ("regressed", "device 0.350 to 0.750 ms, 2.14 times")
    (change,) = compare.changes([replace(now, meta=replace(now.meta, gpu="another"))], [base])
    assert (change.word, change.name) == ("unsure", "Speed on another")
    wrong = replace(base, rows=(replace(ROWS[0], wrong="gate G1"), *base.rows[1:]))
    assert [change.word for change in compare.changes([wrong], [base])] == ["regressed"]


def test_mutants_are_the_same_on_other_lines(tmp_path: Path) -> None:
    base, moved = (read(mutate_file(tmp_path / "mutate.json", line=line)) for line in (5, 15))
    assert compare.changes([moved], [base]) == []
    worse = read(mutate_file(tmp_path / "mutate.json", ("survived", "killed", "equivalent"), line=15))
    found = compare.changes([worse], [base])
    assert [(change.word, change.text) for change in found] == [
        ("regressed", "survived, was killed"),
        ("improved", "killed, was survived"),
    ]


def test_a_gate_says_what_changed_between_its_own_sides(tmp_path: Path) -> None:
    gate = read(gate_file(tmp_path / "gate.json"))
    assert [(change.word, change.name, change.text) for change in compare.changes([gate], None)] == [
        ("regressed", "swiglu", "is lost: it was defined before"),
        ("regressed", "rope / value / bfloat16", f"passed before, and fails now: {MESSAGE.partition(chr(10))[0]}"),
        ("regressed", "rope / 4x64 / bfloat16", SLOWER.partition("bfloat16: ")[2]),
        ("regressed", "Gate of mine.kernels on cpu", "the ledger has another card"),
        ("skipped", "rope / 2x64 / bfloat16", "the base: gate G1; the head: gate G1"),
        ("new", "rope / value / float32", "new"),
        ("improved", "rope / 8x64 / bfloat16", "device_full 0.900 [0.880 0.920]"),
    ]
    text = shown(tmp_path / "out.md", tmp_path / "gate.json")
    assert "| `Gate of mine.kernels on cpu` | 4 regressions, 1 FASTER, 1 SAME, 1 SLOWER | `gate.json` |" in text
    assert "Against the base: 4 regressed, 1 skipped, 0 unsure, 1 new, 1 improved." in text


def test_what_fails_and_is_no_regression_is_no_success(tmp_path: Path) -> None:
    """In no format does a gate read as if everything were right where both sides are wrong."""
    both = [one.as_dict() for one in RESULTS[:2]]
    file = tmp_path / "gate.json"
    Report(properties(both, both), meta={"versions": {}, "backend": "mine", "device": "cpu"}).write(file)
    text = shown(tmp_path / "out.md", file)
    assert "## Conformance: ⚠️ nothing got worse, 1 other failure\n" in text
    assert "| `Gate of mine on cpu` | 0 regressions, 1 other failure | `gate.json` |" in text
    assert "<summary>Other failures (1)</summary>\n\n- `rope / value / bfloat16`\n" in text
    assert "- nothing got worse, 1 other failure" in Parsed(shown(tmp_path / "out.html", file)).words
    (suite,) = ElementTree.fromstring(shown(tmp_path / "out.xml", file))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "0", "1")


def test_a_check_that_a_gate_rejects_has_its_command(tmp_path: Path) -> None:
    """In every format; other regressions have none."""
    gate = gate_file(tmp_path / "gate.json")
    (command,) = (change.again for change in compare.changes([read(gate)], None) if change.again)
    case = "rope bfloat16 value rows=1 fill=randn seed=0"
    assert command == f"python -m conformance repro --backend mine.kernels --device cpu '{case}'"
    assert f"\n  ```sh\n  {command}\n  ```\n" in shown(tmp_path / "out.md", gate)
    rows = Parsed(shown(tmp_path / "out.html", gate)).tables["Changes against the base"]
    assert [row[1] for row in rows if row[2].endswith(command)] == ["rope / value / bfloat16"]


def test_a_command_of_several_lines_stays_in_its_item(tmp_path: Path) -> None:
    """A line that is not indented would end the item, and what follows would be markup."""
    gate = gate_file(tmp_path / "gate.json")
    gate.write_text(gate.read_text().replace('"mine.kernels"', '"mine\\n# @someone"'))
    (command,) = (change.again for change in compare.changes([read(gate)], None) if change.again)
    block = "\n".join(f"  {line}" for line in ("```sh", *command.split("\n"), "```"))
    assert "\n  # @someone" in block and f"\n{block}\n" in shown(tmp_path / "out.md", gate)
    root = ElementTree.fromstring(shown(tmp_path / "out.xml", gate))
    assert [failure.text.endswith(f"reproduce: {command}") for failure in root.iter("failure") if failure.text] == [
        False,
        True,
        False,
    ]


def test_the_comment(tmp_path: Path) -> None:
    base = run_file(tmp_path / "base.json", [replace(RESULTS[1], verdict="pass", budget_use=0.5), *RESULTS[2:]])
    file = run_file(tmp_path / "run.json")
    text = shown(tmp_path / "out.md", file, "--base", base)
    lines = text.split("\n")
    assert lines[0] == "## Conformance: ❌ 1 failed"
    assert "| `Run of mine.kernels on cpu` | 1 of 5 checks failed, 1 skipped, 1 known deviation | `run.json` |" in lines
    assert "Against the base: 1 regressed, 0 skipped, 0 unsure, 1 new, 0 improved." in lines
    assert "- `rope / value / bfloat16`: `gate G1 used 2.74 of the budget in output loss at index ()`" in lines
    assert "- `rope / value / float32`: `pass`" in lines
    assert "Against" not in shown(tmp_path / "out.md", file)


def test_the_comment_stays_below_the_limit_and_counts_the_rest(tmp_path: Path) -> None:
    long = [replace(RESULTS[1], op=f"op_{place}", message="`" * 40 + "m" * 9000) for place in range(400)]
    file = run_file(tmp_path / "run.json", long)
    base = run_file(tmp_path / "base.json", [replace(one, verdict="pass") for one in long])
    text = shown(tmp_path / "out.md", file, bench_file(tmp_path / "bench.json"), "--base", base)
    assert 40_000 < len(text) < 65_536
    regressed, left = (
        len(re.findall(r"^- `op_", text, re.MULTILINE)),
        re.findall(r"^and (\d+) more", text, re.MULTILINE),
    )
    failures = len(re.findall(r"^\*\*`op_", text, re.MULTILINE))
    assert regressed + (int(left[0]) if len(left) == 2 else 0) == 400
    assert failures + int(left[-1]) == 400
    assert text.count("<details>") == text.count("</details>") == 3  # what is new, the speed and the versions
