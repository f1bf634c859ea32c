"""`conformance gate`: compare two revisions, or one with a ledger; every regression fails, in one sentence."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conformance.case import DTYPES
from conformance.gate import job, ledger
from conformance.gate.job import Report, Request
from conformance.gate.ledger import Ledger, LedgerError
from conformance.gate.sides import Unavailable, checkouts
from conformance.gate.statistics import Verdict
from conformance.gate.verdict import BUDGET_RISE, Row, name
from conformance.gate.worktrees import RevisionError
from conformance.running.catalogue import UsageError, device_of, known, names_of
from conformance.verbs._shared import (
    Verbs,
    add_search,
    add_source,
    add_verb,
    demand_at_least,
    demand_writable,
    source_of,
)
from unsloth_ref.checks import counted


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "gate", "compare two revisions, or one with a ledger, and fail if anything got worse")
    parser.add_argument("--base", metavar="REV", help="the revision to compare with")
    parser.add_argument("--head", metavar="REV", help="the revision to judge (the files as they are)")
    parser.add_argument("--base-backend", metavar="NAME", help="the backend's name on the base (that of --backend)")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="the ledger to compare with, in place of --base")
    parser.add_argument(
        "--minutes", type=float, default=20.0, metavar="M", help="time limit of all timings, on a GPU (20)"
    )
    parser.add_argument(
        "--budget-rise",
        type=float,
        default=BUDGET_RISE,
        metavar="SHARE",
        help=f"rise of a budget use that is allowed ({BUDGET_RISE})",
    )
    parser.add_argument(
        "--target", nargs="+", action="extend", metavar="T", help="GPU targets of fingerprints, or none (all)"
    )
    parser.add_argument("--mutants", type=int, default=0, metavar="N", help="plant N faults in each operation (none)")
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes (one per core, at most 4)")
    parser.add_argument("--deviations", type=Path, metavar="FILE", help="known deviations of the backend, as TOML")
    add_search(parser)
    add_source(parser)
    parser.set_defaults(verb=_gate)


def _gate(arguments: argparse.Namespace) -> int:
    if arguments.base_backend and arguments.ledger:
        raise UsageError("--base-backend: got a ledger, which records one name; allowed: with --base")
    if arguments.mutants and arguments.ledger:
        raise UsageError("--mutants: got a ledger, which records none; allowed: with --base")
    if (arguments.base is None) == (arguments.ledger is None):
        raise UsageError("gate: got both --base and --ledger, or neither; allowed: exactly one of them")
    request = _request(arguments)
    try:
        recorded = _recorded(arguments.ledger, request) if arguments.ledger else None
        demand_writable(arguments.json)
        with checkouts(arguments.base, arguments.head) as (base, head):
            print(f"gate: {head.revision} against {base.revision if base else arguments.ledger}", flush=True)
            if base is not None:
                report = job.against_base(base, head, request)
            else:
                assert recorded is not None
                report = job.against_ledger(head, request, recorded)
            report.meta |= {"head": head.revision, "base": base.revision if base else None}
    except (RevisionError, LedgerError, Unavailable) as error:
        raise UsageError(str(error)) from error
    print(text(report, arguments.json))
    if arguments.json:
        report.write(arguments.json)
    return 1 if report.regressions else 0


def _recorded(path: Path, request: Request) -> Ledger:
    """The ledger; raises UsageError if nothing in it can be compared: it is of another card, or of other backends."""
    recorded = ledger.read(path)
    card = torch.cuda.get_device_name() if request.device == "cuda" else "cpu"
    if recorded.card != card:
        raise UsageError(f"--ledger: got {path}, of {recorded.card}; allowed on {card}: {ledger.file_name(card)}")
    backends = sorted({entry["backend"] for entry in recorded.entries.values()})
    if request.backend not in backends:
        known = ", ".join(backends) or "none; see ledger update"
        raise UsageError(f"--backend: got {request.backend}; {path} records: {known}")
    return recorded


def _request(arguments: argparse.Namespace) -> Request:
    source = source_of(arguments)
    operations, pieces = names_of(source)
    known("operation", arguments.ops, [*operations, *pieces])
    known("dtype", arguments.dtype, list(DTYPES))
    if arguments.deviations and not arguments.head and not arguments.deviations.is_file():
        raise UsageError(f"--deviations: got {arguments.deviations}, which is no file; allowed: TOML")
    none = "none" in (arguments.target or ())
    if arguments.target and not none:
        from conformance.fingerprint import TARGETS  # needs Triton

        known("target", arguments.target, [*TARGETS, "none"])
    demand_at_least(arguments, minutes=0, budget_rise=0, mutants=0, jobs=1)
    options = {"--profile": arguments.profile, "--jobs": arguments.jobs, "--deviations": arguments.deviations}
    judge = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    return Request(
        arguments.ops,
        arguments.backend,
        device_of(arguments.device),
        judge=judge + (["--property", *arguments.property] if arguments.property else []),
        dtypes=tuple(arguments.dtype or ()),
        targets=() if none else arguments.target,
        minutes=arguments.minutes,
        mutants=arguments.mutants,
        rise=arguments.budget_rise,
        source=source,
        base_backend=arguments.base_backend,
    )


def text(report: Report, json: Path | None = None) -> str:
    """The times of each shape, then warnings, new records, notes, regressions and counts, one per line."""
    times = [row for row in report.rows if row["kind"] == "time" and "times" in row]
    lines = [_time(row) for row in times]
    unsure = _of(times, Verdict.UNSURE)
    lines += [f"warning: {name('time', row)}: UNSURE after all rounds or --minutes, or by noise" for row in unsure]
    if better := [*_of(times, Verdict.FASTER), *_of(report.rows, "improved")]:
        update = f"python -m conformance ledger update {json or 'FILE, with --json FILE'}"
        lines.append(f"better than the base: {len(better)}; record it: {update}")
    for row in _of(report.rows, "wrong"):
        how = "fails as before" if row["base"] else "fails; the ledger does not record it"
        lines.append(f"note: {name(row['kind'], row)}: {how}")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"FAIL {sentence}" for sentence in report.regressions]
    return "\n".join([*lines, _closing(report)])


def _of(rows: Sequence[Row], verdict: str) -> list[Row]:
    return [row for row in rows if row["verdict"] == verdict]


def _time(row: Row) -> str:
    about = name("time", row)
    if row["verdict"] is None:
        return f"{about}: no speed: {row['no_speed'] or 'no kind of time on all sides'}"
    return f"{about}: {row['verdict']}  " + ", ".join(f"{kind} {_ratio(one)}" for kind, one in row["times"].items())


def _ratio(one: dict[str, Any]) -> str:
    return f"{one['ratio']:.3f} [{one['low']:.3f} {one['high']:.3f}]"


def _closing(report: Report) -> str:
    counts = Counter(row["kind"] for row in report.rows)
    words = {"property": "check", "fingerprint": "kernel", "time": "shape", "mutant": "mutant"}
    compared = ", ".join(counted(counts[kind], word) for kind, word in words.items() if counts[kind])
    where = f" in {compared}" if compared else "; nothing was compared"
    return counted(len(report.regressions), "regression") + where
