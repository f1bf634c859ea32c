"""The gate on a repository made for the test: it finds what got worse, and leaves the repository as it was."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conformance.cli import main
from conformance.gate.sides import Checkout, Side, Unavailable, checkouts, verb
from conformance.gate.worktrees import RevisionError, commit_of
from tests.judge.test_action import ACTION
from tests.processes import PATIENCE, alive, heeded, wait_for

ROOT = Path(__file__).parents[2]
GPU, CPU = ROOT / "ledger" / "nvidia-h200.json", ROOT / "ledger" / "cpu.json"
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
    """Demand that no checkout is left, on disk or in git's list."""
    assert list((toy.parent / "tmp").iterdir()) == []
    assert len(git(toy, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("base", ["{first}", "first", "0" * 40, "{last}"])
def test_the_action_finds_its_base_in_a_shallow_clone(toy: Path, base: str) -> None:
    """By commit or by name, here or at the origin; for the push of a new branch it is the default branch."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == "fetch the base")
    first, last = git(toy, "rev-parse", "HEAD~1"), git(toy, "rev-parse", "HEAD")
    git(toy, "branch", "first", first)
    clone, output = toy.parent / "clone", toy.parent / "output"
    git(toy, "config", "uploadpack.allowAnySHA1InWant", "true")  # as GitHub
    git(toy, "clone", "-q", "--depth=1", toy.as_uri(), str(clone))
    environment = os.environ | {"BASE": base.format(first=first, last=last), "DEFAULT": "first"}
    environment |= {"GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], env=environment, cwd=clone, check=True)
    assert output.read_text() == f"revision={last if 'last' in base else first}\n"


@here
@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", -1), ("SIGKILL", -9)])
def test_a_gate_that_is_stopped_leaves_nothing(toy: Path, number: str, status: int) -> None:
    """While a side runs: neither a checkout nor a process, nor a file of results, even if the gate is killed."""
    started = toy.parent / "started"
    code = f"import os, pathlib, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
    (toy / "slow_kernels.py").write_text(f"{code}time.sleep({2 * PATIENCE})\n")
    git(toy, "add", "-A")
    git(toy, "commit", "-qm", "slow")
    words = ["gate", "--base", "HEAD", "layer_norm", "--backend", "slow_kernels", "--json", str(toy.parent / "x.json")]
    with heeded(signal.Signals[number]):
        gate = subprocess.Popen([sys.executable, "-m", "conformance", *words], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: started.exists() and started.read_text() != "")
        gate.send_signal(signal.Signals[number])
        assert gate.wait(PATIENCE) == status
    finally:
        gate.kill()
        gate.wait()
    if status > 0:  # otherwise another process is still busy with it
        demand_untouched(toy)
    wait_for(lambda: not alive(int(started.read_text())))
    wait_for(lambda: list((toy.parent / "tmp").iterdir()) == [])
    demand_untouched(toy)
    assert (toy.parent / "x.json").read_text() == ""


@pytest.mark.parametrize("revision", ["first", "-x", "HEAD^{/kernels, the first}", ":/kernels, the first", "@{0}"])
def test_a_revision_of_any_name(toy: Path, revision: str) -> None:
    """A tag with a message, a branch that looks like an option, and a text of the commit's message, with spaces."""
    git(toy, "commit", "-q", "--allow-empty", "-m", "kernels, the first")
    git(toy, "tag", "-am", "a message", "first")
    git(toy, "update-ref", "refs/heads/-x", "HEAD")
    assert commit_of(toy, "base", revision) == git(toy, "rev-parse", "HEAD")


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


def test_a_checkout_has_the_submodules_of_its_revision(toy: Path, tmp_path: Path) -> None:
    """Taken from the working tree's repositories of them, also of submodules of submodules; all stay as they were."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder, name in ((inner, "deep.py"), (outer, "third.py")):
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / name).write_text("first")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "first")
    local = ("-c", "protocol.file.allow=always")
    git(outer, *local, "submodule", "--quiet", "add", str(inner), "an inner one")
    git(outer, "commit", "-qm", "inner")
    git(toy, *local, "submodule", "--quiet", "add", str(outer), "third")
    git(toy, *local, "submodule", "--quiet", "update", "--init", "--recursive")
    git(toy, "commit", "-qam", "outer")
    third = toy / "third"
    (third / "third.py").write_text("second")
    git(third, "commit", "-qam", "second")
    with checkouts("HEAD", None) as (base, _):
        assert base is not None
        assert (base.root / "third/third.py").read_text() == "first"
        assert (base.root / "third/an inner one/deep.py").read_text() == "first"
    demand_untouched(toy)
    for folder in (third, third / "an inner one"):
        assert len(git(folder, "worktree", "list").splitlines()) == 1
    head = "1" * 40
    git(toy, "update-index", "--cacheinfo", f"160000,{head},third")
    git(toy, "commit", "-qm", "a commit of the submodule that is not here")
    message = r"^--base: submodule third: 111111111111 cannot be checked out: "
    with pytest.raises(RevisionError, match=message), checkouts("HEAD", None):
        pass
    demand_untouched(toy)


def test_a_side_imports_its_own_checkout(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import paths inside of the repository become those of the side's checkout; those outside stay."""
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
        with pytest.raises(Unavailable, match=r"base: toy_kernels is imported from .*, not from the checkout of"):
            base.demand_own("toy_kernels")
        for folder in (toy, base.root):  # a package without a file, of which the base has another module
            (folder / "spread").mkdir()
        (toy / "spread/new.py").write_text("swiglu = print")
        (base.root / "spread/old.py").write_text("swiglu = print")
        path = os.pathsep.join((str(base.root), str(toy)))
        monkeypatch.setattr(Checkout, "environment", lambda self: {**os.environ, "PYTHONPATH": path})
        base.demand_own("spread.old")
        with pytest.raises(Unavailable, match=r"base: spread.new.swiglu is imported from .*new.py, not from the"):
            base.demand_own("spread.new.swiglu")


def test_a_backend_that_is_not_of_the_repository_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An installed package, or one of this project's backends, is the same on both sides: nothing would be found."""
    elsewhere = toy.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "installed_kernels.py").write_text(KERNELS)
    monkeypatch.setenv("PYTHONPATH", f"{elsewhere}{os.pathsep}{ROOT}")
    for name, place in (("installed_kernels", elsewhere / "installed_kernels.py"), ("fast", ROOT)):
        assert main(["gate", "--base", "HEAD", "--backend", name]) == 2
        said = f"--backend: got {name}, which is {place} on both sides; allowed: a module that Python finds in {toy}\n"
        assert capsys.readouterr().err.endswith(f"conformance: {said}")
    demand_untouched(toy)
    Checkout("base", "abc", ROOT, ROOT, toy).demand_own("fast")  # here the judge and the reference can change too


def test_a_repository_inside_of_an_environment(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /usr/src/app is in that of the system's Python, /usr: its folders are no installed packages."""
    monkeypatch.setattr(sys, "prefix", str(toy.parent))
    with checkouts("HEAD", None) as (base, _):
        assert base is not None
        assert base.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(base.root)
        monkeypatch.setattr(Checkout, "environment", lambda self: {**os.environ, "PYTHONPATH": str(toy)})
        (base.root / "toy_kernels.py").unlink()
        with pytest.raises(Unavailable, match=r"base: toy_kernels is imported from .*, not from the checkout of"):
            base.demand_own("toy_kernels")


def test_a_base_without_a_side_is_one_line(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has a judge of its own that is too old: its package conformance cannot measure on command."""
    package = toy / "conformance"
    package.mkdir()
    (package / "__init__.py").write_text("")
    line = "conformance: operation: got 'rope'; allowed: none"
    (package / "__main__.py").write_text(f"import sys\nsys.exit({line!r})")
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


def test_a_base_without_the_module_of_an_entry_point_is_judged_without_it(toy: Path) -> None:
    """A package is installed once, for the working tree; its base may lack what its entry points name."""
    package = toy / "conformance"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "left_out = os.environ['CONFORMANCE_WITHOUT'].split()\n"
        "for point in ('first of conformance.specs', 'second'):\n"
        "    if point.split()[0] not in left_out:\n"
        "        sys.exit(f'conformance: entry point {point}: ModuleNotFoundError: No module')\n"
        'Path(sys.argv[-1]).write_text(\'{"meta": {}, "results": []}\')\n'
    )
    git(toy, "add", "-A")
    git(toy, "commit", "-qm", "another judge")
    with checkouts("HEAD", "HEAD") as (base, head):
        assert base is not None
        assert verb(base, ["run", "rope"]) == ({}, [])
        assert base.without == ["first", "second"]
        with pytest.raises(Unavailable, match=r"^head: entry point first of conformance.specs: ModuleNotFoundError"):
            verb(head, ["run", "rope"])


def test_a_revision_that_a_shallow_clone_lacks(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = toy.parent / "a clone"
    git(toy, "clone", "-q", "--depth=1", toy.as_uri(), str(clone))
    monkeypatch.chdir(clone)
    message = r"--base: got 'HEAD~1'; allowed: a revision of .*a clone, which is a shallow clone: git fetch --unshallow"
    with pytest.raises(RevisionError, match=message), checkouts("HEAD~1", None):
        pass
    with checkouts("HEAD", None) as (base, _):
        assert base is not None and (base.root / "toy_kernels.py").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "no-such-branch"), "--base: got 'no-such-branch'; allowed: a revision of"),
        (("--base", "HEAD", "--head", "--all"), "expected one argument"),
        (("--base", "HEAD", "soup"), "operation: got 'soup'; allowed:"),
        (("--base", "HEAD", "--dtype", "float8"), "dtype: got 'float8'"),
        (("--base", "HEAD", "--target", "sm_90", "sm_9"), "target: got 'sm_9'; allowed: sm_80, "),
        (("--base", "HEAD", "--minutes", "-1"), "--minutes: got -1.0; allowed: 0 or more"),
        (("--base", "HEAD", "--budget-rise", "nan"), "--budget-rise: got nan; allowed: 0 or more"),
        (("--base", "HEAD", "--deviations", "no.toml"), "--deviations: got no.toml, which is no file; allowed: TOML"),
        (("--base", "HEAD", "--jobs", "0"), "--jobs: got 0; allowed: 1 or more"),
        (("--base", "HEAD", "--mutants", "-1"), "--mutants: got -1; allowed: 0 or more"),
        (("--ledger", "x.json", "--mutants", "1"), "--mutants: got a ledger, which records none; allowed: with --base"),
        (("--ledger", "x.json", "--base-backend", "a"), "--base-backend: got a ledger, which records one name; "),
        ((), "got both --base and --ledger, or neither"),
        (("--base", "HEAD", "--ledger", "x.json"), "got both --base and --ledger, or neither"),
        (("--ledger", "x.json"), "x.json: No such file or directory"),
        (("--ledger", str(GPU), "--device", "cpu"), "nvidia-h200.json, of NVIDIA H200; allowed on cpu: cpu.json"),
        (("--ledger", str(CPU), "--device", "cpu", "--backend", "toy"), "--backend: got toy; "),
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
    with (
        pytest.raises(RevisionError, match="is in no git repository that can be used: fatal: not a git"),
        checkouts("HEAD", None),
    ):
        pass


def rows(heading: str) -> list[list[str]]:
    """The rows of a table of docs/gate.md."""
    after = (ROOT / "docs" / "gate.md").read_text().partition(f"| {heading} |")[2]
    lines = after.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_documents_name_every_option_and_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gate", "--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert {word for row in rows("option of `gate`") for word in re.findall(r"--[a-z-]+", row[0])} == options
    assert [row[0].strip("`") for row in rows("input of the action")] == list(ACTION["inputs"])
