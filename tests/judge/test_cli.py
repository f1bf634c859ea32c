"""The command line: its JSON, and one line on stderr for a usage error."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import unsloth_ref.kernels
import unsloth_ref.training
from conformance import declarations
from conformance.cli import main
from conformance.properties import PROPERTIES
from conformance.running.catalogue import UsageError
from conformance.specs import specs
from conformance.verbs._shared import demand_writable
from tests.processes import PATIENCE, group_exists, wait_for

ROOT = Path(__file__).parents[2]
RIGHT = "tests.judge.right.swiglu_by_sigmoid"
here = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="judging on the CPU would select Triton's interpreter for the other tests of this process",
)


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a usage error prints."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("conformance: ")
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "seen", "allowed"),
    [
        (("run", "soup"), "operation: got 'soup'", "rms_norm"),
        (("run", "--dtype", "float8"), "dtype: got 'float8'", "bfloat16"),
        (("run", "--property", "beauty"), "property: got 'beauty'", "gradients"),
        (("run", "--backend", "no.such.module"), "backend: got 'no.such.module'", "reference"),
        (("run", "--backend", "json"), "json defines no operation", "swiglu"),
        (("run", "--backend", RIGHT, "rms_norm"), f"backend {RIGHT} defines none of rms_norm", "nothing to run"),
        (("run", "--profile", "lazy"), "invalid choice: 'lazy'", "nightly"),
        (("run", "--device", "tpu"), "invalid choice: 'tpu'", "cuda"),
        (("run", "--jobs", "0"), "--jobs: got 0", "1 or more"),
        (("coverage", "swiglu", "--jobs", "-1"), "--jobs: got -1", "1 or more"),
        (("coverage", "swiglu", "--lines", "-1"), "--lines: got -1", "0 or more"),
        (("coverage",), "coverage: got no OP", "--spec"),
        (("run", "--no-such-flag"), "--no-such-flag", "unrecognized"),
        (("bench", "soup"), "operation: got 'soup'", "rms_norm"),
        (("bench", "--dtype", "float8"), "dtype: got 'float8'", "bfloat16"),
        (("judge",), "'judge'", "run"),
        ((), "VERB", "required"),
        (("repro", "swiglu float32 rows=1"), "missing: hidden", "case"),
        (("repro", "swiglu float32 rows=1 hidden=2 shape=3"), "got 'shape=3'", "hidden"),
        (("repro", "swiglu"), "repro: got 'swiglu'", "OP DTYPE"),
        (("repro", "pack lengths=[1]"), "repro: got 'pack lengths=[1]'", "PIECE PROPERTY"),
        (("repro", "pack order lengths=[1]"), "missing: capacity", "case"),
        (("repro", "pack order lengths=1 capacity=4"), "got lengths=1", "a list"),
        (("repro", "pack order lengths=[1] capacity=x"), "got capacity=x", "int"),
        (("repro", "pack lengths=[1] capacity=4"), "repro: got 'pack lengths=[1] capacity=4'", "PIECE PROPERTY"),
        (("repro", "geglu float32 rows=1 hidden=2 approximate=sin"), "got approximate=sin", "tanh"),
        (("repro", "rms_norm float32 rows=1 hidden=2 eps=x"), "got eps=x", "or another number"),
        (("run", "pack", "--property", "gradients"), "no property of gradients", "nothing to run"),
        (("repro", f"rms_norm float32 rows=1 hidden=2 --backend {RIGHT}"), "--backend", "allowed"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(
    arguments: tuple[str, ...], seen: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = usage_error(capsys, *arguments)
    assert seen in line
    assert allowed in line


@pytest.mark.skipif(sys.platform == "win32", reason="has no such folders")
def test_a_file_in_a_folder_that_cannot_be_written() -> None:
    """The file is replaced as a whole, which needs the folder: found before the work, not after it."""
    with tempfile.TemporaryDirectory() as name:  # a folder of pytest is closed to other users
        file, user = Path(name) / "run.json", os.geteuid()
        file.touch(0o666)
        file.chmod(0o666)
        file.parent.chmod(0o555)
        os.seteuid(user or 65534)  # nothing is closed to root
        try:
            with pytest.raises(UsageError, match=r"--json: got .*run.json; it cannot be written: Permission denied"):
                demand_writable(file)
        finally:
            os.seteuid(user)
            file.parent.chmod(0o755)


@here
def test_a_file_of_deviations_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--deviations: got no.toml" in usage_error(capsys, *RUN_SWIGLU, "--deviations", "no.toml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("arguments", [("run", "--device", "cuda"), ("bench",)])
def test_cuda_without_cuda(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA device" in usage_error(capsys, *arguments)


@pytest.fixture
def fresh_specs(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test change what `specs` loads."""
    specs.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    specs.cache_clear()


RUN_SWIGLU = ("run", "swiglu", "--backend", RIGHT, "--device", "cpu")


@here
def test_an_operation_without_a_spec(fresh_specs: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh_specs.setattr(unsloth_ref.kernels, "__all__", [*unsloth_ref.kernels.__all__, "soup"])
    line = usage_error(capsys, *RUN_SWIGLU)
    assert "soup has no spec: conformance/specs/soup.py is missing" in line


@here
def test_a_file_without_a_spec(fresh_specs: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh_specs.delattr("conformance.specs.swiglu.spec")
    line = usage_error(capsys, *RUN_SWIGLU)
    assert "conformance/specs/swiglu.py: got spec = None; allowed: a Spec" in line


@here
def test_a_failing_import_in_a_spec_is_not_reported_as_a_missing_spec(fresh_specs: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'soup'", name="soup")

    fresh_specs.setattr(declarations.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="soup"):
        main(RUN_SWIGLU)


@here
def test_the_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has one property that passes, one that fails and one that needs CUDA."""
    file = tmp_path / "new" / "results.json"
    backend = "tests.judge.wrong.swiglu_forgets_up"
    properties = ("value", "gradients", "no_sync")
    arguments = ("--device", "cpu", "--dtype", "float32", "--property", *properties, "--json", str(file), "--jobs", "1")
    assert main(["run", "swiglu", "--backend", backend, "--profile", "ci", *arguments]) == 1
    written = json.loads(file.read_text())
    assert set(written) == {"meta", "results"}
    assert {"versions", "device", "backend", "profile", "commit", "not_defined"} <= set(written["meta"])
    assert written["meta"]["device"] == "cpu"
    assert written["meta"]["profile"] == "ci"
    assert written["meta"]["backend"].startswith(backend)
    contract = {*unsloth_ref.kernels.__all__, *unsloth_ref.training.__all__}
    assert set(written["meta"]["not_defined"]) == contract - {"swiglu"}
    results = {result["property"]: result for result in written["results"]}
    keys = {"op", "property", "dtype", "verdict", "budget_use", "examples", "case", "message", "coverage", "cut_short"}
    assert all(set(result) == keys for result in results.values())
    assert [results[name]["verdict"] for name in properties] == ["pass", "fail", "skip"]
    assert 0 <= results["value"]["budget_use"] <= 1
    assert results["value"]["examples"] > 0
    assert results["value"]["case"] is results["value"]["message"] is None
    assert results["gradients"]["message"] == "gradient of up is missing (None)"
    assert results["gradients"]["case"] == "rows=1 hidden=1 fill=randn layout=contiguous seed=0"
    assert "reproduce:" in capsys.readouterr().out


@here
def test_status_2_if_everything_was_skipped() -> None:
    assert main(["run", "swiglu", "--backend", RIGHT, "--device", "cpu", "--property", "no_sync", "--jobs", "1"]) == 2


def test_list_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    contract = (*unsloth_ref.kernels.__all__, *unsloth_ref.training.__all__)
    words = printed.split()
    assert all(name in words for name in (*contract, *PROPERTIES, "tokens_kept", "nightly", "fast,"))


def test_a_closed_pipe_is_not_reported_as_an_error() -> None:
    """A reader such as `head` may close the pipe before the output ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "conformance", "list"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@here
def test_pieces_have_no_dtype_column(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("shift_labels", "--backend", "reference", "--device", "cpu", "--property", "signature_parity")
    assert main(["run", *arguments, "--jobs", "1"]) == 0
    assert "float32" not in capsys.readouterr().out


@here
@pytest.mark.parametrize(
    ("name", "status", "verdict"),
    [
        ("value", 0, "ok   swiglu / value / float16"),
        ("gradients", 1, "FAIL swiglu / gradients / float16: gradient of up"),
    ],
)
def test_repro_runs_one_case(name: str, status: int, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"swiglu float16 {name} rows=2 hidden=3 fill=tiny seed=1"
    assert main(["repro", line, "--backend", "tests.judge.wrong.swiglu_forgets_up", "--device", "cpu"]) == status
    printed = capsys.readouterr().out
    assert printed.startswith(verdict)
    assert "Case(" not in printed
    (again,) = (line.partition("python -m conformance ")[2] for line in printed.splitlines() if "reproduce:" in line)
    assert main(shlex.split(again)) == status  # what is printed can be pasted
    assert capsys.readouterr().out == printed


def test_a_stopped_run_leaves_no_process() -> None:
    """A time limit and a cancelled job send SIGTERM, after which no process may run."""
    command = [sys.executable, "-u", "-m", "conformance", "run", "rope", "--device", "cpu", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    assert b"against reference" in process.stdout.readline()
    assert b"budget" in process.stdout.readline()  # the worker has been started
    process.terminate()
    # The pipe ends with the last process; the one that workers are forked from may finish its imports first.
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert b"rope" not in printed  # which has no results yet
    wait_for(lambda: not group_exists(process.pid))
