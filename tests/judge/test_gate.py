"""The gate: sentences for what got worse, speed only for what is right, and a repository that it leaves as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import backends
from conformance.bench.card import Rates
from conformance.cli import main
from conformance.gate import verdict
from conformance.gate.job import Report, Request, compare_times
from conformance.gate.side import Server
from conformance.gate.sides import Checkout, RevisionError, Side, Unavailable, checkouts, verb
from conformance.gate.statistics import SIDES
from conformance.spec import Spec
from conformance.specs import specs
from conformance.verbs.gate import text
from tests.judge.fake_card import RATES, STATE, FakeCard
from unsloth_ref import kernels as reference

ROOT = Path(__file__).parents[2]
here = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")

KERNELS = """
from torch.nn import functional


def layer_norm(x, weight, bias, eps=1e-5):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
"""
SWIGLU = """

def swiglu(gate, up):
    return functional.silu(gate) * up
"""


# --- verdicts -------------------------------------------------------------------------------------------------------


def check(op: str = "rope", name: str = "value", **values: Any) -> dict[str, Any]:
    defaults = {"verdict": "pass", "budget_use": 0.2, "coverage": None, "message": None, "case": None, "examples": 9}
    return {"op": op, "property": name, "dtype": "float32", **defaults, **values}


FAILED = {"verdict": "fail", "message": "gate G1 used 3\nmore"}


@pytest.mark.parametrize(
    ("base", "head", "sentences", "found"),
    [
        (check(), check(), [], "same"),
        (check(), check(budget_use=0.29), [], "same"),
        (check(), check(budget_use=0.31), ["rope / value / float32: budget use: got 31 %; allowed: 30 % (before: 20 %)"], "regressed"),
        (check(), check(budget_use=0.05), [], "improved"),
        (check(), check(**FAILED), ["rope / value / float32: passed before, and fails now: gate G1 used 3"], "regressed"),
        (check(), check(verdict="skip", message="no C++"), ["rope / value / float32: passed before, and is skipped now: no C++"], "regressed"),
        (check(), check(verdict="xfail", message="known"), ["rope / value / float32: passed before, and is a known deviation now: known"], "regressed"),
        (check(), None, ["rope / value / float32: passed before, and is not checked now"], "lost"),
        (None, check(), [], "new"),
        (None, check(**FAILED), ["rope / value / float32: is new and fails: gate G1 used 3"], "regressed"),
        (check(**FAILED), check(), [], "improved"),
        (check(**FAILED), check(**FAILED), [], "wrong"),
        (check(verdict="skip"), check(**FAILED), ["rope / value / float32: did not fail before, and fails now: gate G1 used 3"], "regressed"),
        (check(verdict="skip"), check(verdict="skip"), [], "same"),
    ],
)  # fmt: skip
def test_checks(base: Any, head: Any, sentences: list[str], found: str) -> None:
    assert verdict.property_change(base, head) == (sentences, found)


def test_a_lost_operation_is_one_sentence() -> None:
    rows = verdict.properties([check("rope"), check("rope", "layouts"), check("geglu")], [check("geglu")])
    assert [row["regressions"] for row in rows if row["regressions"]] == [["rope: is lost: it was defined before"]]


def test_coverage_that_falls_is_one_sentence() -> None:
    """It is compared over the checks of both sides: a new property that covers little is no fall."""
    base = [check(coverage=0.8), check(name="layouts", coverage=0.6)]
    head = [check(coverage=0.5), check(name="layouts", coverage=0.6), check(name="new", coverage=0.01)]
    found = [sentence for row in verdict.properties(base, head) for sentence in row["regressions"]]
    assert found == ["rope / float32: mean coverage: got 55 %; allowed: 65 % (before: 70 %)"]
    assert not any(row["regressions"] for row in verdict.properties(base[1:], head[1:]))


PRINT = {
    "op": "rope", "shape": "llama", "dtype": "float16", "kernel": "k", "target": "sm_90", "registers": 40, "stack": 0,
    "shared": 1024, "load": 16, "store": 16, "problem": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"registers": 50}, None),
        ({"registers": 51}, "registers: got 51; allowed: 50 (before: 40)"),
        ({"stack": 8}, "stack: got 8 bytes; allowed: 0 (before: 0)"),
        ({"shared": 2048}, "shared: got 2048 bytes; allowed: 1280 (before: 1024)"),
        ({"load": 4}, "widest load: got 4 bytes; allowed: 16, as before"),
        ({"problem": "does not compile"}, "does not compile"),
        ({"kernel": "another"}, None),
    ],
)
def test_fingerprints(change: dict[str, Any], sentence: str | None) -> None:
    """The first of two launches of the same kernel changes, the second does not."""
    rows = verdict.fingerprints([PRINT, PRINT], [{**PRINT, **change}, PRINT])
    found = [sentence for row in rows for sentence in row["regressions"]]
    assert found == ([f"rope / llama / float16 / k / sm_90 / 0: {sentence}"] if sentence else [])


# --- times, on a fake card ------------------------------------------------------------------------------------------


def right(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up)


def wrong(gate: Tensor, up: Tensor) -> Tensor:
    return 1.1 * reference.swiglu(gate, up)


class WrongLater:
    """Right while it is judged, wrong in the rounds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls += 1
        return (right if self.calls < 15 else wrong)(gate, up)


class Card(FakeCard):
    """A fake card with peak rates, and a little noise: two values in turn."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__(milliseconds)
        self.calls = 0

    def rates(self) -> Rates:
        return RATES

    def state(self) -> dict[str, Any]:
        return STATE

    def time_alone(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.calls += 1
        return self.milliseconds * (1 + 1e-3 * (self.calls % 3)), call()

    time_queued = time_alone


class LocalSide:
    """A side in this process."""

    def __init__(self, milliseconds: float, function: Any, load: Callable[[Any], None]) -> None:
        self._server = Server(lambda: Card(milliseconds))  # type: ignore[arg-type, return-value]
        self._function, self._load = function, load
        self._answers: list[dict[str, Any]] = []

    def tell(self, do: str, **command: Any) -> None:
        self._load(self._function)
        answer = self._server.answer(do, **json.loads(json.dumps(command)))
        self._answers.append(json.loads(json.dumps(answer, allow_nan=False)))

    def hear(self) -> dict[str, Any]:
        return self._answers.pop(0)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.tell(do, **command)
        return self.hear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Report]]:
    """Compare the times of a base and a head, each milliseconds and a function, on one small shape of swiglu."""
    swiglu: Spec = specs()["swiglu"]
    small = replace(swiglu, speed=replace(swiglu.speed, shapes={"small": {"rows": 4, "hidden": 64}}))
    monkeypatch.setattr("conformance.bench.measure.specs", lambda: {"swiglu": small})
    current: list[Any] = [right]

    def load(name: str, device: str, source: Any) -> backends.Judged:
        return backends.Judged(name, {"swiglu": current[0]}, name)

    monkeypatch.setattr(backends, "load", load)

    def compare(base: tuple[float, Any], head: tuple[float, Any]) -> Report:
        def use(function: Any) -> None:
            current[0] = function

        report = Report()
        sides: Mapping[str, LocalSide] = {name: LocalSide(*(head if name == "head" else base), use) for name in SIDES}
        request = Request(["swiglu"], "mine", "cuda", dtypes=("float32",))
        compare_times(sides, request, [("swiglu", "float32")], report)
        return report

    yield compare


def test_a_slower_head_fails_and_a_faster_one_is_a_record(timed: Callable[..., Report]) -> None:
    slower = timed((10.0, right), (10.5, right))
    assert slower.rows[0]["verdict"] == "SLOWER"
    assert len(slower.regressions) == 4  # one per kind of time
    assert slower.regressions[0].startswith("swiglu / small 4x64 / float32: forward: SLOWER: 1.050 [1.04")
    assert slower.meta["copy_bytes_per_second"] == RATES.copy
    faster = timed((10.0, right), (9.0, right))
    assert (faster.rows[0]["verdict"], faster.regressions) == ("FASTER", [])
    assert faster.rows[0]["head"]["device_full"][1] == pytest.approx(4.5, rel=0.01)  # two sets in each graph
    assert "better than the base: 1; record it" in text(faster)


def test_the_same_is_the_same(timed: Callable[..., Report]) -> None:
    report = timed((10.0, right), (10.0, right))
    assert (report.rows[0]["verdict"], report.regressions) == ("SAME", [])
    assert {one["rounds"] for one in report.rows[0]["times"].values()} == {20}


@pytest.mark.parametrize("function", [wrong, WrongLater()])
def test_what_is_not_right_has_no_speed(function: Any, timed: Callable[..., Report]) -> None:
    """Neither before the rounds nor after them."""
    report = timed((10.0, right), (1.0, function))
    (row,) = report.rows
    assert (row["verdict"], row["times"]) == (None, {})
    assert row["head"]["full"] is None
    (sentence,) = report.regressions
    assert sentence.startswith("swiglu / small 4x64 / float32: wrong, and has no speed: ")
    assert "no speed: the head: " in text(report)


def test_a_wrong_base_gives_no_ratio(timed: Callable[..., Report]) -> None:
    report = timed((1.0, wrong), (10.0, right))
    assert (report.rows[0]["verdict"], report.rows[0]["times"], report.regressions) == (None, {}, [])


def test_a_side_takes_commands_in_order() -> None:
    with pytest.raises(ValueError, match="do: got 'sample'; allowed: start"):
        Server().answer("sample", kind="full", count=1)


# --- a repository ---------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=toy", "-c", "user.email=toy@example.com"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: right kernels; then a wrong layer_norm and no swiglu. The files as they are cannot be imported."""
    folder = tmp_path / "toy"
    folder.mkdir()
    git(folder, "init", "-q")
    for content in (KERNELS + SWIGLU, KERNELS.replace("eps)", "10 * eps)")):
        (folder / "toy_kernels.py").write_text(content)
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "kernels")
    (folder / "toy_kernels.py").write_text("raise SystemExit('these are the files as they are')")
    monkeypatch.chdir(folder)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")  # an import path into the repository
    return folder


def demand_untouched(toy: Path) -> None:
    """No checkout is left, on disk or in git's list."""
    assert list((toy.parent / "tmp").iterdir()) == []
    assert len(git(toy, "worktree", "list").splitlines()) == 1


@here
def test_a_wrong_kernel_and_a_lost_operation_fail(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gate", "--base", "HEAD~1", "--head", "HEAD", "layer_norm", "swiglu", "--backend", "toy_kernels"]
    words += ["--dtype", "float32", "--property", "one_at_a_time", "--profile", "dev", "--jobs", "1"]
    path = toy.parent / "gate.json"
    assert main([*words, "--json", str(path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("gate: ")
    assert [line for line in printed if line.startswith("FAIL")] == [
        "FAIL swiglu: is lost: it was defined before",
        next(
            line for line in printed if line.startswith("FAIL layer_norm / one_at_a_time / float32: passed before, and")
        ),
    ]
    assert printed[-1] == "2 regressions in 2 checks"
    found = json.loads(path.read_text())
    assert found["meta"]["base"] == git(toy, "rev-parse", "HEAD~1")[:12]
    assert found["meta"]["head"] == git(toy, "rev-parse", "HEAD")[:12]
    assert [row["verdict"] for row in found["results"]] == ["lost", "regressed"]
    demand_untouched(toy)


@here
def test_sigterm_leaves_nothing(toy: Path) -> None:
    """Neither a checkout nor a process, where the gate is stopped while a side runs."""
    started = toy.parent / "started"
    code = f"import os, pathlib, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    (toy / "slow_kernels.py").write_text(code)
    git(toy, "add", "-A")
    git(toy, "commit", "-qm", "slow")
    words = ["gate", "--base", "HEAD", "layer_norm", "--backend", "slow_kernels", "--json", str(toy.parent / "x.json")]
    with subprocess.Popen([sys.executable, "-m", "conformance", *words], stdout=subprocess.DEVNULL) as gate:
        deadline = time.monotonic() + 60
        while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        gate.send_signal(signal.SIGTERM)
        assert gate.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert (toy.parent / "x.json").read_text() == ""
    demand_untouched(toy)


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt])
def test_checkouts_are_removed_whatever_ends_them(toy: Path, ends: type[BaseException]) -> None:
    def use() -> None:
        with checkouts("HEAD~1", None) as (base, head):
            assert base is not None
            assert (base.root / "toy_kernels.py").read_text() == KERNELS + SWIGLU
            assert (head.root, head.revision) == (toy.resolve(), "working tree")
            raise ends

    with pytest.raises(ends):
        use()
    demand_untouched(toy)


def test_a_side_imports_its_own_checkout(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the import path names inside of the repository; what it names outside stays."""
    outside = toy.parent / "elsewhere"
    monkeypatch.setattr(sys, "path", [str(toy), str(outside), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(toy / "lib"), str(outside))))
    with checkouts("HEAD", None) as (base, head):
        assert base is not None
        entries = base.environment()["PYTHONPATH"].split(os.pathsep)
        assert entries[0] == str(base.root)
        assert not [entry for entry in entries if Path(entry).is_relative_to(toy)]
        assert {str(base.root / "lib"), str(outside)} <= set(entries)
        assert base.words([f"{toy}/a.py:f", "a.py:f", "8"]) == [f"{base.root}/a.py:f", "a.py:f", "8"]
        assert head.words([f"{toy}/a.py:f"]) == [f"{toy.resolve()}/a.py:f"]
        base.demand_own("toy_kernels")
        monkeypatch.setattr(Checkout, "environment", lambda self: {**os.environ, "PYTHONPATH": str(toy)})
        (base.root / "toy_kernels.py").unlink()
        with pytest.raises(Unavailable, match="base: toy_kernels is imported from .*, not from the checkout of"):
            base.demand_own("toy_kernels")


def test_a_base_without_a_side_is_one_line(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge of its own that is too old: a package called conformance that cannot measure on command."""
    package = toy / "conformance"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys\nsys.exit('conformance: operation: got \\'rope\\'; allowed: none')"
    )
    git(toy, "add", "-A")
    git(toy, "commit", "-qm", "an old judge")
    with checkouts("HEAD", None) as (base, _):
        assert base is not None
        side = Side(base)
        with pytest.raises(Unavailable, match=r"^base: \w{12} cannot be timed: it has no conformance.gate.side") as why:
            side.ask("start", backend="toy_kernels", source={})
        side.close()
        assert "\n" not in str(why.value)
        with pytest.raises(Unavailable, match="defines none of these operations"):
            verb(base, ["run", "rope", "--backend", "toy_kernels"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "no-such-branch"), "--base: got 'no-such-branch'; allowed: a revision of"),
        (("--base", "HEAD", "--head", "--all"), "expected one argument"),
        (("--base", "HEAD", "soup"), "operation: got 'soup'; allowed:"),
        (("--base", "HEAD", "--dtype", "float8"), "dtype: got 'float8'"),
        (("--base", "HEAD", "--minutes", "-1"), "--minutes: got -1.0; allowed: 0 or more"),
        (("--base", "HEAD", "--budget-rise", "nan"), "--budget-rise: got nan; allowed: 0 or more"),
        (("--base", "HEAD", "--jobs", "0"), "--jobs: got 0; allowed: 1 or more"),
        ((), "got both --base and --ledger, or neither"),
        (("--base", "HEAD", "--ledger", "x.json"), "got both --base and --ledger, or neither"),
        (("--ledger", "x.json"), "x.json: No such file or directory"),
    ],
)
def test_a_usage_error_is_one_line(
    words: tuple[str, ...], message: str, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", *words]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err
    demand_untouched(toy)


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RevisionError, match="is in no git repository"), checkouts("HEAD", None):
        pass
