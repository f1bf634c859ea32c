"""`conformance report --history`: the revisions of a ledger, or several ledgers, as one table per kind of figure."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from conformance.cli import main
from conformance.gate.history import points
from conformance.gate.ledger import Ledger, LedgerError, results_of
from tests.judge.shown import Parsed, run_file, shown
from tests.judge.test_ledger import META, PROPERTY, TIME, changed

STACK = "python 3.12.1, torch 2.11.0, triton 3.6.0, cuda 13.0, driver 580.1, sm_clock_mhz 1980"


def written(path: Path, *results: dict[str, Any]) -> Path:
    recorded = Ledger("NVIDIA H200")
    assert recorded.update(results_of(META, results))[1] == []
    recorded.write(path)
    return path


def git(folder: Path, *arguments: str) -> None:
    named = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *named, *arguments], check=True, capture_output=True)


@pytest.fixture
def ledgers(tmp_path: Path) -> list[Path]:
    """Three states: a time gets shorter, an operation gains a check, a shape is no longer timed."""
    slow = changed(TIME, full=[0.3, 0.5, 0.6], device_full=[0.2, 0.4, 0.5], peak_mebibytes=600.0)
    fast = changed(TIME, device_full=[0.2, 0.3, 0.4])
    rope = changed(PROPERTY, op="rope", budget_use=0.0)
    return [
        written(tmp_path / "1.json", slow, PROPERTY),
        written(tmp_path / "2.json", fast, PROPERTY, changed(PROPERTY, property="gradients", budget_use=0.6), rope),
        written(tmp_path / "3.json", changed(PROPERTY, budget_use=0.45), rope),
    ]


def test_several_ledgers_in_the_order_given(ledgers: list[Path], tmp_path: Path) -> None:
    page = Parsed(shown(tmp_path / "page.html", "--history", ledgers[0], "--history", *ledgers[1:]))
    assert "3 revisions, from 1.json to 3.json." in page.words
    assert page.tables["Budget use, the largest of all properties"] == [
        ["what", "first", "last", "change", "over time"],
        ["fast / rope / bfloat16", "0 %", "0 %", "", "2.json: 0 %3.json: 0 %"],
        ["fast / swiglu / bfloat16", "30 %", "45 %", "+50.0 %", "1.json: 30 %2.json: 60 %3.json: 45 %"],
    ]
    about = "fast / swiglu / llama 4096x14336 / bfloat16, device, stack 1"
    assert f"stack 1: {STACK}" in page.words
    assert page.tables["Milliseconds, forward and backward"][1:] == [
        [about, "0.4", "0.3 gone", "-25.0 %", "1.json: 0.42.json: 0.3"]
    ]
    assert page.tables["Peak memory in MiB"][1][1:4] == ["600", "512 gone", "-14.7 %"]
    assert ("points", "4.0,4.0 80.0,9.0") in page.attributes  # of 0.4 and 0.3 of three points


def test_a_change_too_small_to_show_is_none(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{n}.json", changed(PROPERTY, budget_use=0.5 - 1e-5 * n)) for n in (1, 2)]
    page = Parsed(shown(tmp_path / "page.html", "--history", *paths))
    assert page.tables["Budget use, the largest of all properties"][1][1:4] == ["50 %", "50 %", ""]


def test_the_revisions_of_one_ledger(ledgers: list[Path], tmp_path: Path) -> None:
    """Revisions that follow the schema are shown; the file comes last, if it differs from the last commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    for place, text in enumerate([path.read_text() for path in ledgers[:2]] + ["{}"]):
        (folder / "card.json").write_text(text)
        git(folder, "add", "card.json")
        git(folder, "commit", "--quiet", "--message", str(place), "--date", "2026-01-02T03:04:05Z")
    (folder / "card.json").write_text(ledgers[2].read_text())
    found = points([folder / "card.json"])
    assert [point.ledger for point in found] == [point.ledger for point in points(ledgers)]
    assert found[-1].label == "working tree"
    git(folder, "commit", "--quiet", "--all", "--message", "last")
    assert [len(point.label.split()[1]) for point in points([folder / "card.json"])] == [8, 8, 8]
    page = Parsed(shown(tmp_path / "page.html", run_file(tmp_path / "run.json"), "--history", folder / "card.json"))
    assert {"Summary", "Budget use, the largest of all properties"} <= page.tables.keys()


def test_before_the_first_commit_there_is_the_file(ledgers: list[Path], tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    page = Parsed(shown(tmp_path / "page.html", "--history", ledgers[0]))
    assert "One revision: working tree." in page.words
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "of another branch")
    git(tmp_path, "checkout", "--quiet", "--orphan", "new")
    assert [point.label for point in points(ledgers[:1])] == ["working tree"]


def test_the_revisions_of_a_link_and_of_a_name_with_special_characters(ledgers: list[Path], tmp_path: Path) -> None:
    """A link has the revisions of its target; a name that is a pattern too has those of no other file."""
    git(tmp_path, "init", "--quiet")
    for place, path in enumerate(ledgers[:2]):
        for name in ("[12].json", "other.json"):
            (tmp_path / name).write_text(path.read_text())
        git(tmp_path, "add", "[12].json" if place else ".")
        git(tmp_path, "commit", "--quiet", "--message", "results")
    (tmp_path / "1.json").write_text("")
    git(tmp_path, "commit", "--quiet", "--all", "--message", "others")
    (tmp_path / "far").mkdir()
    link = tmp_path / "far" / "link.json"
    link.symlink_to("../[12].json")
    for path in (tmp_path / "[12].json", link):
        assert [len(point.label.split()[1]) for point in points([path])] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ([], "report: got no FILE; allowed: files that --json of a verb wrote, or --history LEDGER"),
        (["--history", "1.json", "2.json", "--format", "markdown"], "--history: got format markdown; allowed: html"),
        (["--history", "1.json", "no.json"], "report: no.json: No such file or directory"),
        (["--history", "1.json", "2.json", "-o", "2.json"], "--output: got 2.json, a file of results; allowed: "),
        (["--history", "1.json"], "report: 1.json: git: "),
    ],
)
@pytest.mark.usefixtures("ledgers")
def test_usage_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    seen: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert seen in printed.err


def test_a_ledger_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(LedgerError, match="no JSON"):
        points([tmp_path / "a.json"])
