"""How did a ledger change? Its committed revisions, or several ledgers, as points in the order of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.gate import ledger
from conformance.gate.ledger import Ledger, LedgerError
from conformance.gate.worktrees import git


@dataclass(frozen=True)
class Point:
    """A state of the ledger: the date and the commit, "working tree", or the name of its file."""

    label: str
    ledger: Ledger


def points(paths: Sequence[Path]) -> list[Point]:
    """Of one ledger its revisions in git and the file as it is, the oldest first; of several ledgers their order.

    Revisions that do not follow today's schema are left out. Before the first commit there is only the file.

    Raises:
        LedgerError: a file is no ledger, or the only one is not in a repository.
    """
    if len(paths) > 1:
        return [Point(path.name, ledger.read(path)) for path in paths]
    (path,) = paths
    now = Point("working tree", ledger.read(path))
    place = path.resolve()  # git knows the target of a link, and not what it holds
    begun = _git(path, "rev-parse", "--verify", "--quiet", "HEAD", allowed=(0, 1))  # 1 before the first commit
    log = _git(path, "log", "--reverse", "--format=%H %cs", "--", place.name).splitlines() if begun else []
    found: list[Point] = []
    for commit, date in (line.split() for line in log):
        try:
            then = ledger.parsed(_git(path, "show", f"{commit}:./{place.name}"), path)
        except LedgerError:  # of an older schema, or removed by this commit
            continue
        found.append(Point(f"{date} {commit[:8]}", then))
    return found if found and found[-1].ledger == now.ledger else [*found, now]


def _git(path: Path, *arguments: str, allowed: Sequence[int] = (0,)) -> str:
    """What git prints about a file, run in its folder; names of files are no patterns."""
    try:
        done = git(path.resolve().parent, "--literal-pathspecs", *arguments)
    except FileNotFoundError as error:
        raise LedgerError(f"{path}: its revisions need git, which is not installed") from error
    if done.returncode not in allowed:
        raise LedgerError(f"{path}: git: {(done.stderr.strip() or 'no message').splitlines()[0]}")
    return done.stdout
