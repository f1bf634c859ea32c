"""The output of `conformance mutate`: a line for each mutant, survivors as diffs, a matrix, the kill rate, JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conformance.mutate.campaign import Key, Original, Outcome
from conformance.reporting import results_file
from conformance.reporting.results_file import commit, versions
from conformance.running.search import Result

KIND_WIDTH = 18


class Lines:
    """A line for each mutant that is not killed, or for each if the output is no terminal; there a progress bar."""

    def __init__(self, count: int) -> None:
        """Prepare to show this many mutants."""
        self._terminal = sys.stdout.isatty()
        columns = (TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, transient=True, disable=not self._terminal)
        self._progress = self._bar.add_task("", total=count)

    def __enter__(self) -> Lines:
        """Show the progress bar."""
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove it."""
        self._bar.stop()

    def add(self, outcome: Outcome) -> None:
        """Show the verdict on a mutant."""
        self._bar.advance(self._progress)
        if not self._terminal or outcome.survives:
            self._bar.console.print(line(outcome), markup=False, highlight=False, emoji=False, soft_wrap=True)


def line(outcome: Outcome) -> str:
    """The verdict in one line."""
    by = (
        f" by {' / '.join(x for x in (outcome.failed[0].property, outcome.failed[0].dtype) if x)}"
        if outcome.failed
        else ""
    )
    return f"{outcome.verdict:<11}{outcome.op} {outcome.mutant.name}{by}"


def survivors(outcomes: Sequence[Outcome], again: str) -> str:
    """The mutants that were not killed: survivors first, then those with the same bits, then the confirmed ones.

    Args:
        outcomes: of all mutants.
        again: the command that examines one of them again, without its name.
    """
    paragraphs = []
    for outcome in outcomes:
        if outcome.survives:
            same = ": every result has the bits of the original" if outcome.same else ""
            why = ": no case runs the changed expression" if outcome.verdict == "unreached" else same
            paragraphs.append(_paragraph("SURVIVED", outcome, why, again))
    for outcome in outcomes:
        if outcome.verdict == "same bits":
            why = ": a launch parameter that changes no bit of any result"
            paragraphs.append(_paragraph("SAME BITS", outcome, why, again))
    paragraphs += [
        f"EQUIVALENT {one.op} {one.mutant.name}: {one.reason}" for one in outcomes if one.verdict == "equivalent"
    ]
    return "\n\n".join(paragraphs)


def _paragraph(title: str, outcome: Outcome, why: str, again: str) -> str:
    where = f" in {outcome.mutant.function}" if outcome.mutant.function else ""
    command = again.replace("{op}", outcome.op)
    return "\n".join(
        (
            f"{title} {outcome.op} {outcome.mutant.name}{where}{why}",
            *(f"  {text}" for text in outcome.mutant.diff.splitlines()),
            f"  again: {command} --mutant '{outcome.mutant.name}'",
        )
    )


def matrix(outcomes: Sequence[Outcome]) -> str:
    """One row per kind of mutant, those with survivors first; one column per property that killed any.

    A mutant counts under every property that failed; unless all were asked for, that is the first one.
    """
    kills: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        row = kills.setdefault(outcome.mutant.kind, Counter())
        row["mutants"] += 1
        if outcome.verdict == "killed":
            row.update({one.property for one in outcome.failed})
        else:
            row["survived" if outcome.survives else outcome.verdict] += 1
    ends = ("survived", "same bits", "equivalent", "raised")
    by_property = Counter({name: n for row in kills.values() for name, n in row.items()})
    properties = sorted(by_property.keys() - {*ends, "mutants"}, key=lambda name: (-by_property[name], name))
    columns = ("mutants", *ends, *properties)
    rows = [f"{'kind':<{KIND_WIDTH}}{'  '.join(columns)}"]
    for kind, row in sorted(kills.items(), key=lambda item: (-item[1]["survived"], item[0])):
        rows.append(f"{kind:<{KIND_WIDTH}}" + "  ".join(f"{row[name] or '.':>{len(name)}}" for name in columns))
    return "\n".join(rows)


def rate(outcomes: Sequence[Outcome]) -> float:
    """The killed part of the mutants that are not equivalent; 1.0 without any."""
    judged = [one for one in outcomes if one.verdict not in ("same bits", "equivalent")]
    return 1.0 - sum(one.survives for one in judged) / max(1, len(judged))


def closing(outcomes: Sequence[Outcome]) -> str:
    """One line: the counts and the kill rate."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    judged = len(outcomes) - counts["same bits"] - counts["equivalent"]
    return (
        f"{counts['killed'] + counts['raised']} of {judged} mutants killed ({100 * rate(outcomes):.1f} %),"
        f" {counts['raised']} of them because every call raises; {counts['survived']} survived,"
        f" {counts['unreached']} were not reached; beside them {counts['equivalent']} confirmed as equivalent"
        f" and {counts['same bits']} launch parameters with the same bits"
    )


def broken(originals: Mapping[str, Original]) -> str:
    """The checks that say nothing because the unchanged backend fails them, one line each."""
    return "\n".join(
        f"left out: {op} / {one.property}{f' / {one.dtype}' if one.dtype else ''}: the unchanged backend fails it"
        for op, original in originals.items()
        for one in original.failed
    )


def write_json(path: Path, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> None:
    """Write the outcomes as JSON; facts say what was asked for."""
    meta = {"versions": versions(), **facts, "commit": commit(), "kill_rate": rate(outcomes)}
    results = [
        {
            "op": one.op,
            "mutant": one.mutant.name,
            "kind": one.mutant.kind,
            "verdict": one.verdict,
            "same_bits": one.same,
            "killed_by": [[failed.property, failed.dtype, failed.case, failed.message] for failed in one.failed],
            "reason": one.reason or None,
            "diff": one.mutant.diff,
        }
        for one in outcomes
    ]
    results_file.write(path, meta, results)


def killed_before(paths: Sequence[Path], chosen: Sequence[Key]) -> dict[Key, Outcome]:
    """Those of the chosen mutants that a property killed, as files of `write_json` say.

    Raises:
        ValueError: a file is not one that `write_json` writes.
    """
    found: dict[tuple[str, str], Any] = {}
    for path in paths:
        try:
            results = results_file.parsed(path.read_text(encoding="utf-8"))["results"]
            found |= {(one["mutant"], one["diff"]): one for one in results if one["verdict"] in ("killed", "raised")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
    known = {(op, mutant): found.get((mutant.name, mutant.diff)) for op, mutant in chosen}
    return {
        key: Outcome(
            one["op"],
            key[1],
            one["verdict"],
            tuple(Result(one["op"], by[0], by[1], "fail", case=by[2], message=by[3]) for by in one["killed_by"]),
        )
        for key, one in known.items()
        if one is not None
    }
