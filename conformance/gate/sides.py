"""Two revisions of a repository side by side: their checkouts, and the processes that run their code.

A process of a checkout must not import the working tree, which an editable installation or PYTHONPATH may name. Every
entry of the import path that lies in the repository is therefore replaced by the same place in the checkout.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conformance
from conformance.runner import CASE_TIMEOUT_SECONDS

ANSWER_SECONDS = 2 * CASE_TIMEOUT_SECONDS  # preparing a shape compiles and judges several passes
STOP_SECONDS = 10
LIBRARY = Path(conformance.__file__).resolve().parents[1]

# Prints the file of a dotted path's longest part that is a module: a package can lie in two folders, if it has no file.
ORIGIN = """
import importlib.util, sys
from contextlib import suppress
names = sys.argv[1].split(".")
for count in range(len(names), 0, -1):
    with suppress(ImportError, ValueError):
        if (spec := importlib.util.find_spec(".".join(names[:count]))) is not None:
            print(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))
            break
"""


class Unavailable(Exception):
    """A side cannot do what it was asked; the message is one line that says why.

    Attributes:
        side: "base" or "head".
    """

    def __init__(self, side: str, why: str) -> None:
        super().__init__(f"{side}: {why}")
        self.side = side


class RevisionError(Exception):
    """There is no such revision, or no repository; the message is one line."""


@dataclass(frozen=True)
class Checkout:
    """The files of one side.

    Attributes:
        name: "base" or "head".
        revision: its commit; "working tree" for the files as they are.
        repository: the folder of the working tree.
        root: the folder of this side, the same for the working tree itself.
    """

    name: str
    revision: str
    repository: Path
    root: Path

    def place(self, path: Path) -> Path:
        """Where a path is on this side; a path outside of the repository stays."""
        path = path.absolute()
        resolved = path.resolve()
        if resolved.is_relative_to(self.repository):
            return self.root / resolved.relative_to(self.repository)
        return path

    @property
    def folder(self) -> Path:
        """The current folder on this side."""
        return self.place(Path.cwd())

    def environment(self) -> dict[str, str]:
        """Environment variables under which Python imports this side."""
        # An editable installation can import the repository's packages without an entry in sys.path.
        packages = [self.repository / "src", self.repository]
        entries = [Path.cwd(), *(Path(entry) for entry in sys.path if entry), *packages]
        inside = [entry for entry in entries if entry.resolve().is_relative_to(self.repository)]
        kept = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        wanted = [entry for entry in (*inside, *kept, LIBRARY) if not self._installed(entry.resolve())]
        found = dict.fromkeys(str(self.place(entry)) for entry in wanted)
        return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}

    def words(self, words: Sequence[str]) -> list[str]:
        """Words of a command line, in which a file of the repository is that of this side."""
        parts = [(word.partition(":"), word) for word in words]
        return [
            str(self.place(Path(path))) + colon + rest if Path(path).is_absolute() else word
            for (path, colon, rest), word in parts
        ]

    def demand_own(self, backend: str) -> None:
        """Raise Unavailable if a backend, or what it is in, would come from the working tree instead."""
        name = backend.partition(":")[0]
        found = self.python("-c", ORIGIN, name, capture_output=True, text=True)
        path = Path((found.stdout.splitlines() or ["/"])[-1] or "/").resolve()
        if path.is_relative_to(self.repository) and not path.is_relative_to(self.root) and not self._installed(path):
            raise Unavailable(self.name, f"{name} is imported from {path}, not from the checkout of {self.revision}")

    def _installed(self, path: Path) -> bool:
        """Whether a path is in an environment, which may lie inside of the repository."""
        folders = [sys.prefix]
        if self.repository.is_relative_to(Path(sys.prefix).resolve()):  # such as /usr/src/app in /usr
            names = ("stdlib", "platstdlib", "purelib", "platlib")
            folders = [*site.getsitepackages(), *(sysconfig.get_path(name) for name in names)]
        return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)

    def python(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run this side's Python to its end; it is stopped if this process is."""
        with self.start(*arguments, stdin=subprocess.DEVNULL, **_piped(options)) as process:
            try:
                out, err = process.communicate()
            finally:
                _stop(process)
        return subprocess.CompletedProcess(arguments, process.returncode, out or "", err or "")

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Start this side's Python in its folder."""
        if not self.folder.is_dir():
            raise Unavailable(self.name, f"{self.revision} has no folder {self.folder.relative_to(self.root)}")
        return subprocess.Popen([sys.executable, *arguments], cwd=self.folder, env=self.environment(), **options)


def _piped(options: dict[str, Any]) -> dict[str, Any]:
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return options


def _stop(process: subprocess.Popen[Any]) -> None:
    """Stop a process: by SIGTERM, after which a judge stops its workers; then by SIGKILL."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
    process.wait()


@contextmanager
def checkouts(base: str | None, head: str | None) -> Iterator[tuple[Checkout | None, Checkout]]:
    """The checkouts of two revisions of the current repository; both are removed at the end, whatever ends it.

    Args:
        base: a revision; None for no base.
        head: a revision; None for the working tree.

    Raises:
        RevisionError: there is no such revision, or no repository.
    """
    repository = _repository() if base or head else Path.cwd().resolve()
    commits = {name: _commit(repository, name, revision) for name, revision in (("base", base), ("head", head))}
    with tempfile.TemporaryDirectory(prefix="conformance-gate-") as folder:
        made: list[tuple[Path, Path]] = []
        try:
            sides: dict[str, Checkout] = {}
            for name, commit in commits.items():
                root = Path(folder).resolve() / name if commit else repository
                sides[name] = Checkout(name, commit[:12] if commit else "working tree", repository, root)
                if commit:
                    _check_out(repository, root, commit, f"--{name}", made)
            yield sides["base"] if base else None, sides["head"]
        finally:
            for home, root in reversed(made):
                if git(home, "worktree", "remove", "--force", str(root)).returncode != 0:
                    shutil.rmtree(root, ignore_errors=True)  # half made, or with submodules
                    git(home, "worktree", "prune")


def _check_out(home: Path, root: Path, commit: str, about: str, made: list[tuple[Path, Path]]) -> None:
    """Check out a commit, and its submodules from the repositories that the working tree has of them.

    Args:
        home: the repository.
        root: the new folder.
        commit: of the repository.
        about: the beginning of an error.
        made: gets each repository and its folder.

    Raises:
        RevisionError: the commit, or that of a submodule, cannot be checked out.
    """
    made.append((home, root))
    added = git(home, "worktree", "add", "--quiet", "--detach", str(root), commit)
    if added.returncode != 0:
        why = (added.stderr.strip().splitlines() or [f"status {added.returncode}"])[-1]
        raise RevisionError(f"{about}: {commit[:12]} cannot be checked out: {why}")
    for entry in git(root, "ls-files", "--stage", "-z").stdout.split("\0"):
        about_it, _, path = entry.partition("\t")
        if about_it.startswith("160000 ") and (home / path / ".git").exists():
            _check_out(home / path, root / path, about_it.split()[1], f"{about}: submodule {path}", made)


def _repository() -> Path:
    try:
        found = git(Path.cwd(), "rev-parse", "--show-toplevel")
    except FileNotFoundError as error:
        raise RevisionError("gate: needs git, which is not installed") from error
    if found.returncode != 0:
        why = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[0]  # such as its owner
        raise RevisionError(f"gate: {Path.cwd()} is in no git repository that can be used: {why}")
    return Path(found.stdout.strip()).resolve()


def _commit(repository: Path, name: str, revision: str | None) -> str | None:
    if revision is None:
        return None
    found = git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode != 0:
        raise RevisionError(f"--{name}: got {revision!r}; allowed: a revision of {repository}")
    return found.stdout.strip()


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder. Raises FileNotFoundError if it is not installed."""
    # A hook runs git with variables that name its own repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", f"core.hooksPath={os.devnull}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def verb(checkout: Checkout, words: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a verb of the judge in a checkout, with its own judge if it has one; returns what its JSON file holds.

    What the base does not know yet (an operation, a property, a target) is left out there. Progress goes to stderr.

    Raises:
        Unavailable: nothing ran.
    """
    words = list(words)
    while True:
        with tempfile.TemporaryDirectory(prefix="conformance-gate-") as folder:
            path = Path(folder) / "results.json"
            command = ("-m", "conformance", *words, "--json", str(path))
            done = checkout.python(*command, stdout=2, stderr=subprocess.PIPE, text=True)
            if done.returncode in (0, 1, 2) and path.exists() and path.stat().st_size:
                sys.stderr.write(done.stderr)
                found = json.loads(path.read_text(encoding="utf-8"))
                return found["meta"], found["results"]
        line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        unknown = re.search(r"(operation|property|target): got '(\w+)'", line)
        if unknown is None or checkout.name == "head" or unknown[2] not in words[1:]:
            raise Unavailable(checkout.name, line.removeprefix("conformance: "))
        words.remove(unknown[2])
        if unknown[1] == "operation" and (len(words) == 1 or words[1].startswith("-")):  # would mean: all of them
            raise Unavailable(checkout.name, f"{checkout.revision} defines none of these operations")


class Side:
    """A process of a checkout that measures on command; see conformance/gate/side.py."""

    def __init__(self, checkout: Checkout) -> None:
        """Start it."""
        self._name, self._revision = checkout.name, checkout.revision
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = checkout.start("-m", "conformance.gate.side", **pipes, bufsize=0)

    def tell(self, do: str, **command: Any) -> None:
        """Send a command; `hear` waits for its answer. Raises Unavailable."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
        except BrokenPipeError:
            self._lost()

    def hear(self) -> dict[str, Any]:
        """The answer to the last command. Raises Unavailable."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], ANSWER_SECONDS)[0]:
            raise Unavailable(self._name, f"{self._revision} gave no answer in {ANSWER_SECONDS:g} s: no times")
        line = stdout.readline()
        if not line:
            self._lost()
        return json.loads(line)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises Unavailable."""
        self.tell(do, **command)
        return self.hear()

    def _lost(self) -> None:
        status = self._process.wait()
        raise Unavailable(
            self._name,
            f"{self._revision} cannot be timed: it has no conformance.gate.side, or this ended (status {status})",
        )

    def close(self) -> None:
        """End the process."""
        _stop(self._process)
