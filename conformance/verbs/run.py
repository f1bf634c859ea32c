"""`conformance run`: check the operations and training pieces of a backend."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from conformance import backends
from conformance.case import DTYPES
from conformance.reporting import deviations, report
from conformance.running.catalogue import UsageError, all_properties, judged_by, known, names_of, tasks_of
from conformance.running.runner import Task, run
from conformance.running.search import Result
from conformance.verbs._shared import (
    Verbs,
    add_search,
    add_source,
    add_verb,
    demand_at_least,
    demand_writable,
    source_of,
)


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "run", "check the operations and training pieces of a backend")
    add_search(parser)
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes (one per core, at most 4)")
    parser.add_argument("-x", "--stop", action="store_true", help="stop an operation after its first failure")
    parser.add_argument("--deviations", type=Path, metavar="FILE", help="known deviations of the backend, as TOML")
    add_source(parser)
    parser.set_defaults(verb=_run)


def _run(arguments: argparse.Namespace) -> int:
    source = source_of(arguments)
    operations, piece_names = names_of(source)
    ops = known("operation", arguments.ops, [*operations, *piece_names])
    dtypes = known("dtype", arguments.dtype, list(DTYPES))
    properties = known("property", arguments.property, all_properties())
    demand_at_least(arguments, jobs=1)
    device, judged = judged_by(arguments.backend, arguments.device, source)
    demand_writable(arguments.json)
    if not arguments.ops and not judged.functions.keys() & set(backends.PIECES):
        ops = operations  # most backends define only kernels: do not list all pieces as missing
    tasks = tasks_of(judged, device, arguments.profile, source, ops, properties, dtypes)
    if not tasks:
        defined = [op for op in ops if op in judged.functions]
        if defined:
            raise UsageError(f"{', '.join(defined)}: no property of {', '.join(properties)}: nothing to run")
        raise UsageError(f"backend {arguments.backend} defines none of {', '.join(ops)}: nothing to run")
    path = arguments.deviations or deviations.shipped(arguments.backend)
    known_deviations = deviations.read(path, device) if path else []
    print(report.heading(judged, device, arguments.profile, source), flush=True)
    results: list[Result] = []

    def on_result(task: Task, result: Result) -> None:
        result = deviations.expected(result, known_deviations)
        table.add(task, result)
        results.append(result)
        if arguments.json:  # after every result, so that a stopped run leaves what it found
            report.write_json(arguments.json, results, judged, device, arguments.profile, source)

    judged_ops = {task.op for task in tasks}
    shown = [op for op in ops if op in judged_ops or op not in judged.functions]
    columns = dtypes if any(op in operations for op in shown) else [""]  # pieces have no dtype
    with report.Table(tasks, shown, columns) as table:
        done = run(tasks, on_result, jobs=arguments.jobs, stop_at_failure=arguments.stop)
    results = [deviations.expected(result, known_deviations) for _, result in done]
    results = deviations.gone(results, known_deviations, arguments.profile)
    print()
    if any(result.verdict == "fail" for result in results):
        print(report.failures(results, arguments.backend, device, source), end="\n\n")
    print(report.closing(results))
    if arguments.json:
        report.write_json(arguments.json, results, judged, device, arguments.profile, source)
    return _status(results)


def _status(results: Sequence[Result]) -> int:
    if any(result.verdict == "fail" for result in results):
        return 1
    return 0 if any(result.verdict in ("pass", "xfail") for result in results) else 2
