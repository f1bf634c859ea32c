"""The judge's checks in another repository's test run: what is collected, shown and expected."""

import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from conformance import pytest_checks
from conformance.running.runner import Task
from conformance.running.search import Result

pytest_plugins = ("pytester",)
ROOT = Path(__file__).parents[2]
INSTALLED = "conformance" in entry_points(group="pytest11").names
PLUGIN = [] if INSTALLED else ["-p", "conformance.pytest_plugin"]
OPTIONS = ["--conformance-device", "cpu", "--conformance-profile", "dev"]
MINE = '''
"""One wrong kernel, and one that ends its process."""

import os
import signal

import torch


def swiglu(gate, up):
    wide = gate.float()
    return (wide * torch.sigmoid(wide.detach()) * up.float()).to(gate.dtype)


def geglu(gate, up, approximate="none"):
    os.kill(os.getpid(), signal.SIGKILL)
'''
DEVIATIONS = """
[[deviation]]
operation = "swiglu"
property = "gradients"
reason = "the derivative of the sigmoid is dropped"

[[deviation]]
operation = "swiglu"
property = "exact_laws"
reason = "it rounded twice once"
"""
in_this_process = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="judging on the CPU would select Triton's interpreter for the other tests of this process",
)


class Here:
    """In place of OneByOne: runs tasks in this process."""

    def __call__(self, task: Task) -> Result:
        return task()

    def close(self) -> None:
        pass


@pytest.fixture
def repository(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A repository with kernels, known deviations and a test of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(their_kernels=MINE, test_own="def test_own():\n    pass\n")
    (pytester.path / "known.toml").write_text(DEVIATIONS)
    return pytester


def test_without_the_option_nothing_is_added_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\n\n\ndef test_own():\n    assert 'conformance.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'triton', 'hypothesis.core', 'conformance.pytest_checks'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", *PLUGIN, "-p", "no:hypothesispytest", "test_own.py"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "collected 1 item" in done.stdout


def test_checks_in_two_processes_with_a_report(repository: pytest.Pytester) -> None:
    """A failure shows what `run` shows; a dead process is a failure; known deviations are strict, as in `run`."""
    chosen = "own or float32 and (swiglu or geglu) and (-value or gradients or exact_laws or cuda_graph)"
    chosen += " and not (geglu and (gradients or exact_laws))"
    arguments = ["--conformance-backend", "their_kernels", "--conformance-deviations", "known.toml", "-k", chosen]
    done = repository.runpytest_inprocess(*PLUGIN, *OPTIONS, *arguments, "-n", "2", "--junitxml", "out.xml")
    assert done.ret == 1
    done.assert_outcomes(passed=3, failed=2, xfailed=1, skipped=2)
    shown = done.stdout.str()
    assert "FAIL geglu / value / float32: the process died (SIGKILL)" in shown
    assert "  smallest case: rows=1 hidden=1 " in shown
    line = "repro --backend their_kernels --device cpu 'geglu float32 value rows=1 hidden=1 "
    assert f"  reproduce:     python -m conformance {line}" in shown
    failed = ["-n", "2", *arguments[:2], "--lf", "--collect-only", "-q"]
    found = repository.runpytest_inprocess(*PLUGIN, *OPTIONS, *failed).stdout.str().splitlines()
    assert found[: found.index("")] == ["conformance::geglu[float32-value]", "conformance::swiglu[float32-exact_laws]"]
    assert "FAIL swiglu / exact_laws: passes, but is declared as a deviation: it rounded twice once" in shown
    cases = ElementTree.parse(repository.path / "out.xml").findall(".//testcase[@classname='conformance']")
    of = {case.get("name"): case for case in cases}
    assert set(of) == {
        *(f"swiglu[float32-{name}]" for name in ("value", "gradients", "exact_laws", "cuda_graph")),
        *(f"geglu[float32-{name}]" for name in ("value", "cuda_graph")),
    }
    used = of["swiglu[float32-value]"].find(".//property[@name='budget_use']")
    assert used is not None
    assert 0 < float(used.get("value", "nan")) <= 1
    assert "the derivative of the sigmoid" in of["swiglu[float32-gradients]"].find("skipped").get("message", "")
    (command,) = {line.partition("in pytest:")[2] for line in shown.splitlines() if "in pytest:" in line}
    program, *words = shlex.split(command)
    assert (program, words[-1]) == ("pytest", "conformance::geglu[float32-value]")
    done = repository.runpytest_inprocess(*PLUGIN, *words, "-n", "1")
    done.assert_outcomes(failed=1)
    assert "FAIL geglu / value / float32: the process died (SIGKILL)" in done.stdout.str()


@in_this_process
def test_what_is_collected(repository: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every property is collected in every dtype, those of training pieces without one; names and a marker select."""
    monkeypatch.setattr(pytest_checks, "OneByOne", Here)
    collect = [*PLUGIN, *OPTIONS, "--collect-only", "-q", "--conformance-backend", "reference"]
    done = repository.runpytest_inprocess(*collect, "-m", "conformance")
    found = done.stdout.str().splitlines()
    assert "conformance::rms_norm[bfloat16-value]" in found
    assert "conformance::pack[order]" in found
    assert not any("test_own" in line for line in found)
    done = repository.runpytest_inprocess(*collect, "-k", "layer_norm and float16 and guard_reads or own")
    assert done.stdout.str().splitlines()[:2] == [
        "test_own.py::test_own",
        "conformance::layer_norm[float16-guard_reads]",
    ]
    ids = ["conformance::pack[order]", "conformance::rms_norm[bfloat16-value]"]
    for files in ([], ["test_own.py::test_own"]):  # an id runs one check, as that of a test runs one test
        done = repository.runpytest_inprocess(*collect, ids[1], *files, ids[0])
        assert done.stdout.str().splitlines()[: len(files) + 3] == [*files, ids[1], ids[0], ""]


@in_this_process
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--conformance-backend", "no.such.module"], "backend: got 'no.such.module'"),
        (
            ["--conformance-backend", "their_kernels", "--conformance-profile", "lazy"],
            "profile: got 'lazy'; allowed: dev",
        ),
        (
            ["--conformance-backend", "reference", "--conformance-deviations", "none.toml"],
            "got none.toml, which cannot",
        ),
        (
            ["--conformance-backend", "reference", "conformance::rms_norm[bfloat16-valu]"],
            "conformance: got rms_norm[bfloat16-valu]; allowed: a check",
        ),
    ],
)
def test_a_mistake_is_an_error_of_the_collection(
    repository: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(pytest_checks, "OneByOne", Here)
    done = repository.runpytest_inprocess(*PLUGIN, *OPTIONS, *options)
    assert done.ret == 2
    done.stdout.fnmatch_lines(["*ERROR collecting conformance*", f"*{message.replace('[', '[[]')}*"])


@in_this_process
def test_runxfail_expects_nothing(repository: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest_checks, "OneByOne", Here)
    options = ["--conformance-backend", "their_kernels", "--conformance-deviations", "known.toml", "--runxfail"]
    chosen = "swiglu and float32 and (gradients or exact_laws)"
    done = repository.runpytest_inprocess(*PLUGIN, *OPTIONS, *options, "-k", chosen)
    done.assert_outcomes(passed=1, failed=1)
