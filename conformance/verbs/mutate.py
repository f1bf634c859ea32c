"""`conformance mutate`: plant faults in a backend and see which ones the properties find."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from conformance import operations
from conformance.backends import Judged
from conformance.case import DTYPES
from conformance.mutate import report
from conformance.mutate.campaign import Campaign, Key, Outcome, choose, users
from conformance.mutate.equivalent import confirmed
from conformance.operations import Source
from conformance.properties import PROPERTIES
from conformance.reporting.report import heading
from conformance.running.catalogue import UsageError, judged_by, known
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

GPU_JOBS = 16


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "mutate", "plant faults in a backend and see which ones the properties find")
    add_search(parser)
    parser.add_argument("--sample", type=int, metavar="N", help="draw this many mutants of each operation (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draw (0)")
    parser.add_argument("--file", nargs="+", action="extend", type=Path, metavar="F", help="mutate only these files")
    parser.add_argument("--mutant", nargs="+", action="extend", metavar="M", help="examine only these, by name")
    parser.add_argument(
        "--matrix", action="store_true", help="run every property for every mutant, not only until one fails"
    )
    parser.add_argument(
        "--known", nargs="+", action="extend", type=Path, metavar="FILE",
        help="leave out mutants that such a file of --json shows as killed",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help=f"processes (one per core; at most {GPU_JOBS} on a GPU)")
    add_source(parser)
    parser.set_defaults(verb=_mutate)


def _mutate(arguments: argparse.Namespace) -> int:
    source = source_of(arguments)
    ops = known("operation", arguments.ops, list(operations.specs(source)))
    dtypes = known("dtype", arguments.dtype, list(DTYPES))
    properties = known("property", arguments.property, list(PROPERTIES))
    demand_at_least(arguments, jobs=1, sample=1)
    if source and arguments.backend.partition(":")[0].endswith(".py"):
        raise UsageError(f"--backend: got {arguments.backend}; allowed for mutate: module:function, as it is imported")
    device, judged = judged_by(arguments.backend, arguments.device, source)
    demand_writable(arguments.json)
    chosen = _chosen(arguments, judged, ops)
    try:
        before = report.killed_before(arguments.known or (), chosen)
    except ValueError as error:
        raise UsageError(f"--known: got {error}; allowed: what --json wrote") from error
    cores = os.cpu_count() or 1
    campaign = Campaign(
        arguments.backend,
        device,
        arguments.profile,
        [name for name in properties if PROPERTIES[name].lacks(device) is None],
        dtypes,
        arguments.jobs or (min(cores, GPU_JOBS) if device == "cuda" else cores),
        every=arguments.matrix,
        confirmed=() if arguments.mutant else confirmed(device),
        source=source,
    )
    print(heading(judged, device, arguments.profile, source), flush=True)
    known_ones = f", {len(before)} of them known as killed" * bool(before)
    ops = ", ".join(dict.fromkeys(op for op, _ in chosen))
    print(f"{counted(len(chosen), 'mutant')} of {ops}{known_ones}", flush=True)
    facts = {"device": device, "backend": judged.name, "profile": arguments.profile, "source": source.words()}
    facts |= {"dtypes": dtypes, "sample": arguments.sample, "seed": arguments.seed}
    done = list(before.values())

    def on_outcome(outcome: Outcome) -> None:
        lines.add(outcome)
        done.append(outcome)
        if arguments.json:  # after every verdict, so that a stopped run leaves what it found
            report.write_json(arguments.json, done, facts)

    left = [key for key in chosen if key not in before]
    with report.Lines(len(left)) as lines:
        examined, originals = campaign.run(left, users(judged, left), on_outcome)
    found = before | dict(zip(left, examined, strict=True))
    outcomes = [found[key] for key in chosen]
    parts = (
        report.broken(originals),
        report.survivors(outcomes, _again(arguments, device, source)),
        report.matrix(outcomes),
        report.closing(outcomes),
    )
    print("", *filter(None, parts), sep="\n\n")
    if arguments.json:
        report.write_json(arguments.json, outcomes, facts)
    return 1 if any(outcome.survives for outcome in outcomes) else 0


def _chosen(arguments: argparse.Namespace, judged: Judged, ops: Sequence[str]) -> list[Key]:
    """The mutants to examine, each with its operation."""
    names = arguments.mutant or ()
    chosen = choose(
        judged,
        [op for op in ops if op in judged.functions],
        files=arguments.file or (),
        sample=arguments.sample,
        seed=arguments.seed,
        names=names,
    )
    for name in names:
        if name not in {mutant.name for _, mutant in chosen}:
            raise UsageError(f"--mutant: got {name!r}; allowed: the name of a mutant of {', '.join(ops)}")
    if not chosen:
        raise UsageError(f"backend {arguments.backend} has no mutants for {', '.join(ops)}: nothing to run")
    return chosen


def _again(arguments: argparse.Namespace, device: str, source: Source) -> str:
    """The command that examines a mutant again, without its operation and its name."""
    words = [*source.words(), "--backend", arguments.backend, "--device", device, "--profile", arguments.profile]
    for flag, given in (("--dtype", arguments.dtype), ("--property", arguments.property), ("--file", arguments.file)):
        words += [flag, *map(str, given)] if given else []
    return f"python -m conformance mutate {{op}} {shlex.join(words)}"
