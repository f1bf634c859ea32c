"""What is installed: the wheel holds every file; the judge runs from it outside the checkout, without the trainer."""

import email
import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("unsloth_ref", "unsloth_fast", "conformance")
FILES = {
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
# What the tests, the documents and the action need beside the packages.
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for folder in (".github", "docs", "examples", "ledger", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".pyc" and ".hypothesis" not in path.parts
}
JUDGE = {"torch", "triton", "numpy", "ninja", "hypothesis", "rich"}
BLOCKED = '''
"""Hides the packages of the trainer, in every process of this environment."""

import sys
from importlib.abc import MetaPathFinder

NAMES = {"transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "dill", "pyarrow", "pandas"}


class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
'''
# Runs in the new environment; prints what the assertions need.
SCRIPT = """
import contextlib
import io
import json
from pathlib import Path

import pytest

import conformance
from conformance.cli import VERBS, main


def run(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def refusal(line):
    try:
        exec(line)
    except ImportError as error:
        return str(error)


def main_of_pytest():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        pytest.main(["--help"])
    return out.getvalue()


if __name__ == "__main__":
    misused = ("model", "bisect", "coverage", "bench", "fingerprint", "mutate", "gate", "ledger", "report")
    names = ("run", "list", "repro", "write", *misused)
    found = {
        "home": conformance.__file__,
        "verbs": [verb.__name__.rpartition(".")[2] for verb in VERBS],
        "help": {name: run(name, "--help")["status"] for name in names},
        "fingerprint": run("fingerprint", "swiglu", "--target", "sm_80"),  # before Triton's interpreter is chosen
        "mistakes": {name: run(name, "soup") for name in misused},
        "list": run("list"),
        "write": run("write", "torch.nn.functional:silu", "--example", "input=randn(8,16)"),
        "run": run(*"run swiglu --backend mine --dtype float32 --property value "
            "--jobs 1 --device cpu --profile dev --json out.json".split()),
        "repro": run("repro", "--device", "cpu", "swiglu float32 value rows=2 hidden=3"),
        "refused": [
            refusal("from unsloth_fast import UnslothTrainer"),
            refusal("from unsloth_fast import FastLanguageModel"),
            refusal("from unsloth_fast.models import place"),
        ],
        "pytest": main_of_pytest(),
    }
    Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution, built by the backend that pyproject.toml names."""
    pytest.importorskip("hatchling", reason="hatchling is not installed; it is in the dependency group dev")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_wheel_and_source_distribution_hold_every_file(built: tuple[Path, Path]) -> None:
    wheel, source = built
    assert {f"{package}/py.typed" for package in PACKAGES} <= FILES  # pyproject.toml says Typed
    held = set(zipfile.ZipFile(wheel).namelist())
    assert held >= FILES
    assert {name.partition("/")[0] for name in held} == {*PACKAGES, "unsloth_fast-0.1.0.dist-info"}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert ".github/actions/judge/action.yml" in SOURCES
    assert names >= {*FILES, *SOURCES, "pyproject.toml", "Makefile", ".pre-commit-config.yaml", "README.md", "LICENSE"}


def test_the_trainer_is_an_extra(built: tuple[Path, Path]) -> None:
    """A repository of kernels installs the judge with torch, Triton and Hypothesis."""
    archive = zipfile.ZipFile(built[0])
    metadata = email.message_from_bytes(archive.read("unsloth_fast-0.1.0.dist-info/METADATA"))
    required = [line.partition(";") for line in metadata.get_all("Requires-Dist") or []]
    names = [(line[0].rstrip("<>=!~.,0123456789 "), line[2]) for line in required]
    assert {name for name, condition in names if "extra ==" not in condition} == JUDGE
    train = {name for name, condition in names if "extra == 'train'" in condition}
    assert train == {"transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "dill"}


@pytest.fixture(scope="module")
def found(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SCRIPT found in an environment with the wheel and this one's other packages, without the trainer's."""
    desk = tmp_path_factory.mktemp("desk")
    venv.create(desk / "env")
    python = desk / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(built[0])], check=True)
    (site,) = (desk / "env" / "lib").glob("python*/site-packages")
    (site / "_hidden.py").write_text(BLOCKED)
    (site / "zz_shared.pth").write_text(f"import _hidden\n{sysconfig.get_path('purelib')}\n")
    (desk / "script.py").write_text(SCRIPT)
    (desk / "mine.py").write_text("from unsloth_ref.kernels import swiglu\n")
    subprocess.run([python, "script.py"], cwd=desk, env={"PATH": "/usr/bin:/bin", "HOME": str(desk)}, check=True)
    assert (desk / "env" / "bin" / "unsloth-conformance").exists()
    return json.loads((desk / "found.json").read_text()) | {"results": json.loads((desk / "out.json").read_text())}


@pytest.mark.slow
def test_every_command_runs_outside_the_checkout(found: dict[str, Any]) -> None:
    assert "site-packages" in found["home"]
    assert set(found["help"].values()) == {0}
    assert len(found["help"]) == len(found["verbs"])
    for name, run in found["mistakes"].items():
        assert (run["status"], run["err"].count("\n")) == (2, 1), name
    for name in ("list", "write", "run", "repro", "fingerprint"):
        assert found[name]["status"] == 0, found[name]
    assert [result["verdict"] for result in found["results"]["results"]] == ["pass"]
    assert found["repro"]["out"].startswith("ok   swiglu / value / float32")
    assert "--conformance-backend" in found["pytest"]


@pytest.mark.slow
def test_the_trainer_says_what_to_install(found: dict[str, Any]) -> None:
    first = {"UnslothTrainer": "t", "FastLanguageModel": "t", "unsloth_fast.models": "peft"}  # which is imported first
    for (name, package), said in zip(first.items(), found["refused"], strict=True):
        assert said.startswith(f"{name}: needs {package}")
        assert said.endswith("is not installed; install the packages of the trainer: pip install 'unsloth-fast[train]'")
