"""The checkouts of a gate: git worktrees in a temporary folder, which are removed at the end, whatever ends the gate.

A process of its own removes them: this file, run as a program. It waits until its input ends, which happens also if the
gate is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TRIES, PAUSE_SECONDS = 20, 0.25  # a process that was asked to end may still write files


class RevisionError(Exception):
    """There is no such revision, no repository, or no backend of it; the message is one line."""


@contextmanager
def temporary_folder() -> Iterator[tuple[Path, Callable[[Path, Path], object]]]:
    """A folder for one gate, and a function that takes a repository and the folder of a worktree of it to remove too.

    Both are removed at the end, the last worktree first.
    """
    folder = Path(tempfile.mkdtemp(prefix="conformance-gate-")).resolve()
    command = [sys.executable, "-I", "-S", __file__, str(folder)]
    # In a session of its own it does not get the signals of a terminal.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0) as sweeper:
        stdin = sweeper.stdin
        assert stdin is not None
        try:
            yield folder, lambda *places: [stdin.write(os.fsencode(place) + b"\0") for place in places]
        finally:
            stdin.close()
            sweeper.wait()


def check_out(home: Path, root: Path, commit: str, about: str, remove: Callable[[Path, Path], object]) -> None:
    """Check out a commit, and its submodules from the repositories that the working tree has of them.

    Args:
        home: the repository.
        root: the new folder.
        commit: of the repository.
        about: the beginning of an error.
        remove: gets each repository and its folder, see temporary_folder.

    Raises:
        RevisionError: the commit, or that of a submodule, cannot be checked out.
    """
    remove(home, root)
    added = git(home, "worktree", "add", "--quiet", "--detach", str(root), commit)
    if added.returncode != 0:
        why = (added.stderr.strip().splitlines() or [f"status {added.returncode}"])[-1]
        raise RevisionError(f"{about}: {commit[:12]} cannot be checked out: {why}")
    for entry in git(root, "ls-files", "--stage", "-z").stdout.split("\0"):
        about_it, _, path = entry.partition("\t")
        if about_it.startswith("160000 ") and (home / path / ".git").exists():
            check_out(home / path, root / path, about_it.split()[1], f"{about}: submodule {path}", remove)


def repository() -> Path:
    """The folder of the working tree that the current folder is in. Raises RevisionError."""
    try:
        found = git(Path.cwd(), "rev-parse", "--show-toplevel")
    except FileNotFoundError as error:
        raise RevisionError("gate: needs git, which is not installed") from error
    if found.returncode != 0:
        why = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[0]  # such as its owner
        raise RevisionError(f"gate: {Path.cwd()} is in no git repository that can be used: {why}")
    return Path(found.stdout.strip()).resolve()


def commit_of(home: Path, name: str, revision: str | None) -> str | None:
    """The commit of a revision, if there is one. Raises RevisionError."""
    if revision is None:
        return None
    found = _object_of(home, revision)
    # A second call, as a text to look for (":/text") would include ^{commit}.
    found = found and _object_of(home, f"{found}^{{commit}}")
    if not found:
        shallow = git(home, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        hint = ", which is a shallow clone: git fetch --unshallow gets the others" if shallow else ""
        raise RevisionError(f"--{name}: got {revision!r}; allowed: a revision of {home}{hint}")
    return found


def _object_of(home: Path, name: str) -> str:
    """The hash of a commit or tag; empty if there is none."""
    return git(home, "rev-parse", "--verify", "--quiet", "--end-of-options", name).stdout.strip()


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder. Raises FileNotFoundError if it is not installed."""
    # A hook runs git with variables that name its own repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", f"core.hooksPath={os.devnull}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def sweep(folder: Path, worktrees: list[tuple[Path, Path]]) -> None:
    """Remove worktrees, given as (repository, folder) in the order in which they were made, and a folder."""
    for home, root in reversed(worktrees):
        for _ in range(TRIES):
            git(home, "worktree", "remove", "--force", "--force", str(root))  # twice: also one that is being made
            shutil.rmtree(root, ignore_errors=True)  # half made, or with submodules
            if not root.exists():
                break
            time.sleep(PAUSE_SECONDS)
        git(home, "worktree", "prune")
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    parts = [Path(os.fsdecode(part)) for part in sys.stdin.buffer.read().split(b"\0")[:-1]]
    sweep(Path(sys.argv[1]), list(zip(parts[::2], parts[1::2], strict=True)))
