"""`conformance coverage`: which pairs of settings of an operation's kernels the properties have not run."""

import argparse
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path

from conformance import operations
from conformance.case import DTYPES, Case
from conformance.operations import Source
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.reporting import report, results_file
from conformance.running.catalogue import UsageError, judged_by, known
from conformance.running.coverage import Explored, Pair, explore, shown
from conformance.running.runner import Task, run
from conformance.running.search import Result
from conformance.trial import Trial
from conformance.verbs._shared import (
    Verbs,
    add_backend,
    add_source,
    add_verb,
    demand_at_least,
    demand_writable,
    source_of,
)


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "coverage", "show which paths of an operation's kernels its properties do not run")
    parser.add_argument("op", metavar="OP", nargs="?", help="the operation; not needed with one of your own")
    parser.add_argument("--profile", default="ci", choices=PROFILES, help="how many cases to draw (ci)")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (bfloat16)")
    parser.add_argument("--property", nargs="+", action="extend", metavar="P", help="properties, see list (all)")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="how many cases to list (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all cases to this file")
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes (one per core, at most 4)")
    add_backend(parser)
    add_source(parser)
    parser.set_defaults(verb=_coverage)


def _coverage(arguments: argparse.Namespace) -> int:
    source = source_of(arguments)
    specs = operations.specs(source)
    if not arguments.op and not source:
        raise UsageError("coverage: got no OP; allowed: an operation, or --reference and --example, or --spec")
    (op,) = known("operation", [arguments.op] if arguments.op else None, list(specs))
    (dtype,) = known("dtype", [arguments.dtype], list(DTYPES))
    names = known("property", arguments.property, list(PROPERTIES))
    demand_at_least(arguments, jobs=1, lines=0)
    device, judged = judged_by(arguments.backend, arguments.device, source)
    if op not in judged.functions:
        raise UsageError(f"backend {arguments.backend} does not define {op}")
    demand_writable(arguments.json)
    profile = PROFILES[arguments.profile]
    explored = explore(Trial(specs[op], judged.functions[op], DTYPES[dtype], device), profile)
    if not explored.pairs:
        raise UsageError(f"{op}: backend {arguments.backend} launches no Triton kernel: nothing to cover")
    print(report.heading(judged, device, arguments.profile, source), flush=True)
    tasks = [Task(arguments.backend, op, name, dtype, device, profile.name, source=source) for name in names]
    results = [result for _, result in run(tasks, lambda *_: None, jobs=arguments.jobs)]
    missed = {result.property: _missed(explored, result) for result in results if result.reached}
    print(_table(explored, results), end="\n\n")
    print(_listing(op, explored, missed, arguments, device, source))
    if arguments.json:
        meta = {"device": device, "backend": judged.name, "profile": arguments.profile}
        _write(arguments.json, meta, results, missed)
    failures = report.failures(results, arguments.backend, device, source)
    if failures:
        print("", failures, sep="\n")
    return 1 if failures else 0


def _missed(explored: Explored, result: Result) -> Mapping[Pair, Case]:
    bits = result.reached.pairs if result.reached else 0
    return {pair: case for place, (pair, case) in enumerate(explored.pairs.items()) if not bits >> place & 1}


def _table(explored: Explored, results: Sequence[Result]) -> str:
    """The share of the pairs that each property ran."""
    kernels = len({kernel for kernel, _ in explored.pairs})
    lines = [f"{len(explored.pairs)} pairs of settings of {kernels} kernels, of which were run"]
    found = [(result.property, result.reached) for result in results if result.reached]
    if len(found) > 1:
        found.append(("by any of these", reduce(or_, (reached for _, reached in found))))
    lines += [f"  {name:<{report.name_width(PROPERTIES)}}{100 * reached.share:>4.0f} %" for name, reached in found]
    return "\n".join(lines)


def _listing(
    op: str,
    explored: Explored,
    missed: Mapping[str, Mapping[Pair, Case]],
    arguments: argparse.Namespace,
    device: str,
    source: Source,
) -> str:
    """The pairs that were not run, together with those that the same case reaches; those of most properties first."""
    together: dict[tuple[Case, tuple[str, ...]], list[Pair]] = {}
    for pair, case in explored.pairs.items():
        if names := tuple(name for name, pairs in missed.items() if pair in pairs):
            together.setdefault((case, names), []).append(pair)
    ordered = sorted(together.items(), key=lambda item: (-len(item[0][1]), -len(item[1])))
    lines: list[str] = []
    for (case, names), pairs in ordered[: arguments.lines]:
        which = names[0] if len(names) == 1 else f"{len(names)} of {len(missed)} properties"
        others = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
        lines.append(f"not run by {which}: {shown(pairs[0])}{others}")
        line = f"{op} {arguments.dtype} {_running(pairs[0][0], names, explored, missed)} {case}"
        lines.append(f"  run it: {report.repro(line, arguments.backend, device, source.words())}")
    left = len(ordered) - arguments.lines
    return "\n".join([*lines, *([f"and {left} more cases; --json FILE lists every pair"] if left > 0 else [])])


def _running(kernel: str, names: Sequence[str], explored: Explored, missed: Mapping[str, Mapping[Pair, Case]]) -> str:
    """The first of these properties that runs the kernel at all; `gradients`, which runs both passes, if none does."""
    of_kernel = [pair for pair in explored.pairs if pair[0] == kernel]
    return next((name for name in names if any(pair not in missed[name] for pair in of_kernel)), "gradients")


def _write(
    path: Path, meta: Mapping[str, str], results: Sequence[Result], missed: Mapping[str, Mapping[Pair, Case]]
) -> None:
    """Results as those of `run`, each with the pairs that it did not run and the cheapest case that reaches each."""
    found = [
        result.as_dict() | {"missed": [{"pair": shown(p), "case": str(c)} for p, c in missed[result.property].items()]}
        for result in results
        if result.property in missed
    ]
    results_file.write(path, {"versions": results_file.versions(), **meta}, found)
