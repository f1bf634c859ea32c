"""Two revisions of a repository side by side: their checkouts, and the processes that run their code.

A process of a checkout must not import the working tree, which an editable installation or PYTHONPATH may name. Every
entry of the import path that lies in the repository is therefore replaced by the same place in the checkout.
"""

from __future__ import annotations

import json
import os
import re
import select
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conformance
from conformance import backends
from conformance.gate import worktrees
from conformance.gate.worktrees import RevisionError
from conformance.operations import WITHOUT
from conformance.running.runner import CASE_TIMEOUT_SECONDS

ANSWER_SECONDS = 2 * CASE_TIMEOUT_SECONDS  # preparing a shape compiles and judges several passes
STOP_SECONDS = 10
LIBRARY = Path(conformance.__file__).resolve().parents[1]

# Runs a program that gets SIGTERM when its parent ends, even if that is killed: 1 is PR_SET_PDEATHSIG.
BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""

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


@dataclass(frozen=True)
class Checkout:
    """The files of one side.

    Attributes:
        name: "base" or "head".
        revision: its commit; "working tree" for the files as they are.
        repository: the folder of the working tree.
        root: the folder of this side, the same for the working tree itself.
        temporary: a folder for files, which is removed with the checkouts.
        without: entry points of installed packages that this side cannot load.
    """

    name: str
    revision: str
    repository: Path
    root: Path
    temporary: Path
    without: list[str] = field(default_factory=list)

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
        return {**os.environ, "PYTHONPATH": os.pathsep.join(found), WITHOUT: " ".join(self.without)}

    def words(self, words: Sequence[str]) -> list[str]:
        """Words of a command line, in which a file of the repository is that of this side."""
        parts = [(word.partition(":"), word) for word in words]
        return [
            str(self.place(Path(path))) + colon + rest if Path(path).is_absolute() else word
            for (path, colon, rest), word in parts
        ]

    def demand_own(self, backend: str) -> None:
        """Demand that a backend, or what it is in, is that of this side.

        Raises:
            Unavailable: it would come from the working tree instead.
            RevisionError: it is not of this repository, and would be the same on both sides.
        """
        name = backend.partition(":")[0]
        found = self.python("-c", ORIGIN, name, capture_output=True, text=True)
        path = LIBRARY if name in backends.NAMES else Path((found.stdout.splitlines() or ["/"])[-1] or "/").resolve()
        if self.name == "base" and path != Path("/") and not self._holds(path) and not self._holds(LIBRARY):
            allowed = f"a module that Python finds in {self.repository}"
            raise RevisionError(f"--backend: got {name}, which is {path} on both sides; allowed: {allowed}")
        if self._holds(path) and not path.is_relative_to(self.root) and name not in backends.NAMES:
            raise Unavailable(self.name, f"{name} is imported from {path}, not from the checkout of {self.revision}")

    def _holds(self, path: Path) -> bool:
        """Whether a path is of the repository, in its working tree or on this side."""
        return any(map(path.is_relative_to, (self.repository, self.root))) and not self._installed(path)

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
        # Not by preexec_fn, with which an interrupt in the moment of the fork is lost.
        bound = [sys.executable, "-I", "-S", "-c", BOUND] if sys.platform == "linux" else []
        command = [*bound, sys.executable, *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment(), **options)


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
    home = worktrees.repository() if base or head else Path.cwd().resolve()
    commits = {name: worktrees.commit_of(home, name, revision) for name, revision in (("base", base), ("head", head))}
    with worktrees.temporary_folder() as (folder, remove):
        sides: dict[str, Checkout] = {}
        for name, commit in commits.items():
            root = folder / name if commit else home
            sides[name] = Checkout(name, commit[:12] if commit else "working tree", home, root, folder)
            if commit:
                worktrees.check_out(home, root, commit, f"--{name}", remove)
        yield sides["base"] if base else None, sides["head"]


def verb(checkout: Checkout, words: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a verb of the judge in a checkout, with its own judge if it has one; returns what its JSON file holds.

    What the base does not know yet (an operation, a property, a target, the module of an entry point) is left out
    there. Progress goes to stderr.

    Raises:
        Unavailable: nothing ran.
    """
    words = list(words)
    while True:
        path = checkout.temporary / f"{checkout.name}.json"
        path.unlink(missing_ok=True)  # of another verb
        command = ("-m", "conformance", *words, "--json", str(path))
        done = checkout.python(*command, stdout=2, stderr=subprocess.PIPE, text=True)
        if done.returncode in (0, 1, 2) and path.exists() and path.stat().st_size:
            sys.stderr.write(done.stderr)
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["meta"], found["results"]
        line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        point = re.search(r"entry point (\S+?)(?: of \S+)?: ", line)
        if point and checkout.name == "base" and point[1] not in checkout.without:
            checkout.without.append(point[1])
            continue
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

    def send(self, do: str, **command: Any) -> None:
        """Send a command; `receive` waits for its answer. Raises Unavailable."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
        except BrokenPipeError:
            self._lost()

    def receive(self) -> dict[str, Any]:
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
        self.send(do, **command)
        return self.receive()

    def _lost(self) -> None:
        status = self._process.wait()
        raise Unavailable(
            self._name,
            f"{self._revision} cannot be timed: it has no conformance.gate.side, or this ended (status {status})",
        )

    def close(self) -> None:
        """End the process."""
        _stop(self._process)
