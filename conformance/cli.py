"""The command line: run, list, repro, bench, fingerprint.

Exit status: 0 if everything passed, 1 if something failed, 2 for a usage error or if nothing ran. A usage error is
reported in one line.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from conformance import backends, report
from conformance.backends import Judged
from conformance.bench.card import Card
from conformance.bench.measure import Bench
from conformance.bench.table import heading, text, write_json
from conformance.declarations import SpecError
from conformance.gates import Failure
from conformance.peers import Absent
from conformance.piece import pieces
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.runner import Task, run
from conformance.search import DTYPES, Result
from conformance.spec import specs
from conformance.trial import BackendError

BENCHED = "reference,compile,torch,fast"
LINE = "OP DTYPE [PROPERTY] NAME=VALUE ... or PIECE PROPERTY NAME=VALUE ..."


class UsageError(Exception):
    """A command line that cannot be run; the message states the value seen and the allowed values."""


class _Parser(argparse.ArgumentParser):
    """Prints one line per error instead of the usage text."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a backend may be in the current folder
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.verb(arguments)
        sys.stdout.flush()
        return status
    except (UsageError, BackendError, SpecError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails again
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="conformance", description="Judge kernels against the reference, and time them.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)

    judge = verbs.add_parser("run", help="check the operations and training pieces of a backend")
    judge.add_argument("ops", nargs="*", metavar="OP", help="operations and training pieces (all)")
    judge.add_argument("--profile", default="ci", choices=PROFILES, help="how many cases to draw (ci)")
    judge.add_argument("--dtype", nargs="+", action="extend", metavar="D", help=f"{', '.join(DTYPES)} (all)")
    judge.add_argument("--property", nargs="+", action="extend", metavar="P", help="properties, see list (all)")
    judge.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    judge.add_argument("--jobs", type=int, metavar="N", help="worker processes (one per core, at most 4)")
    judge.add_argument("-x", "--stop", action="store_true", help="leave an operation after its first failure")
    judge.set_defaults(verb=_run)

    listing = verbs.add_parser("list", help="list operations, properties, training pieces, backends and profiles")
    listing.set_defaults(verb=_list)

    repro = verbs.add_parser("repro", help="run one case again, from the line that a failure printed")
    repro.add_argument("line", help=f"'{LINE}'")
    repro.set_defaults(verb=_repro)

    bench = verbs.add_parser("bench", help="compare the speed of backends on a GPU")
    bench.add_argument("ops", nargs="*", metavar="OP", help="operations (all)")
    bench.add_argument("--backend", default=BENCHED, metavar="A,B,...", help=f"backends ({BENCHED})")
    bench.add_argument("--dtype", default="bfloat16", help="dtype of the inputs (bfloat16)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the times to this file")
    bench.set_defaults(verb=_bench)

    prints = verbs.add_parser("fingerprint", help="registers, spills and the like of Triton kernels; needs no GPU")
    prints.add_argument("ops", nargs="*", metavar="OP", help="operations (all)")
    prints.add_argument("--target", nargs="+", action="extend", metavar="T", help="sm_80, sm_90, sm_100, gfx942 (all)")
    prints.add_argument("--dtype", default="bfloat16", help="dtype of the inputs (bfloat16)")
    prints.add_argument("--backend", default="fast", help="fast, or a dotted path (fast)")
    prints.add_argument("--json", type=Path, metavar="FILE", help="also write them to this file")
    prints.set_defaults(verb=_fingerprint)

    for verb in (judge, repro):
        verb.add_argument("--backend", default="fast", help=f"{', '.join(backends.NAMES)}, or a dotted path (fast)")
        verb.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is a CUDA device)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    ops = _known("operation", arguments.ops, [*backends.OPERATIONS, *backends.PIECES])
    dtypes = _known("dtype", arguments.dtype, list(DTYPES))
    specs()
    properties = _known("property", arguments.property, _properties())
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs: got {arguments.jobs}; allowed: 1 or more")
    device, judged = _judged(arguments)
    _demand_writable(arguments.json)
    if not arguments.ops and not judged.functions.keys() & set(backends.PIECES):
        ops = list(backends.OPERATIONS)  # most backends define only kernels: do not list all pieces as missing
    tasks = [
        Task(arguments.backend, op, name, dtype, device, arguments.profile)
        for op in ops
        if op in judged.functions
        for name in properties
        for dtype in (dtypes if op in backends.OPERATIONS else [None])
        if name in _properties_of(op)
    ]
    if not tasks:
        defined = [op for op in ops if op in judged.functions]
        if defined:
            raise UsageError(f"{', '.join(defined)}: no property of {', '.join(properties)}: nothing to run")
        raise UsageError(f"backend {arguments.backend} defines none of {', '.join(ops)}: nothing to run")
    print(report.heading(judged, device, arguments.profile), flush=True)
    results: list[Result] = []

    def on_result(task: Task, result: Result) -> None:
        table.add(task, result)
        results.append(result)
        if arguments.json:  # after every result, so that a stopped run leaves what it found
            report.write_json(arguments.json, results, judged, device, arguments.profile)

    judged_ops = {task.op for task in tasks}
    shown = [op for op in ops if op in judged_ops or op not in judged.functions]
    columns = dtypes if any(op in backends.OPERATIONS for op in shown) else [""]  # pieces have no dtype
    with report.Table(tasks, shown, columns) as table:
        done = run(tasks, on_result, jobs=arguments.jobs, stop_at_failure=arguments.stop)
    results = [result for _, result in done]
    print()
    if any(result.verdict == "fail" for result in results):
        print(report.failures(results, arguments.backend, device), end="\n\n")
    print(report.closing(results))
    if arguments.json:
        report.write_json(arguments.json, results, judged, device, arguments.profile)
    return _status(results)


def _properties_of(op: str) -> Collection[str]:
    return PROPERTIES if op in backends.OPERATIONS else pieces()[op].properties


def _properties() -> list[str]:
    """The names of all properties, of operations and of pieces, without repetitions."""
    return list(dict.fromkeys([*PROPERTIES, *(name for piece in pieces().values() for name in piece.properties)]))


def _status(results: Sequence[Result]) -> int:
    if any(result.verdict == "fail" for result in results):
        return 1
    return 0 if any(result.verdict == "pass" for result in results) else 2


def _list(arguments: argparse.Namespace) -> int:
    print(
        "operations:",
        *(f"  {op:<{report.NAME_WIDTH}}{(s.reference.__doc__ or '').splitlines()[0]}" for op, s in specs().items()),
        sep="\n",
    )
    print(
        "properties:",
        *(f"  {name:<{report.NAME_WIDTH}}{(file.__doc__ or '').splitlines()[0]}" for name, file in PROPERTIES.items()),
        sep="\n",
    )
    print("training pieces, each with its own properties:")
    for op, piece in pieces().items():
        print(f"  {op:<{report.NAME_WIDTH}}{(piece.reference.__doc__ or '').splitlines()[0]}")
        for name, prop in piece.properties.items():
            print(f"    {name:<30}{(prop.check.__doc__ or '').splitlines()[0]}")
    print("backends:", f"  {', '.join(backends.NAMES)}, or the dotted path of a module", sep="\n")
    print(
        "profiles:",
        *(f"  {name:<{report.NAME_WIDTH}}{profile.examples} examples" for name, profile in PROFILES.items()),
        sep="\n",
    )
    return 0


def _repro(arguments: argparse.Namespace) -> int:
    op, dtype, name, line = _parsed(arguments.line)
    try:
        case = pieces()[op].parse(line) if dtype is None else specs()[op].parse(line)
    except ValueError as error:
        raise UsageError(str(error)) from error
    device, judged = _judged(arguments)
    if op not in judged.functions:
        raise UsageError(f"backend {arguments.backend} does not define {op}")
    task = Task(arguments.backend, op, name, dtype, device, case=case)
    ((_, result),) = run([task], lambda *_: None)
    if result.verdict == "fail":
        print(report.failures([replace(result, case=str(case))], arguments.backend, device))
        return 1
    if result.verdict == "skip":
        raise UsageError(f"{name}: {result.message}")
    used = f", {100 * result.budget_use:.3g} % of the budget" if result.budget_use is not None else ""
    print(f"ok   {' / '.join((op, name, *((dtype,) if dtype else ())))}: {case!r}{used}")
    return 0


def _parsed(line: str) -> tuple[str, str | None, str, str]:
    """Operation or piece, dtype, property and case from a line that a failure printed."""
    op, *words = line.split() or [""]
    by_name = [word for word in words if "=" not in word]  # dtype and property; a piece has no dtype
    if not words or (op in backends.PIECES and len(by_name) != 1):
        raise UsageError(f"repro: got {line!r}; allowed: '{LINE}'")
    _known("operation", [op], [*backends.OPERATIONS, *backends.PIECES])
    dtype = None
    if op in backends.OPERATIONS:
        dtype = words.pop(0)
        _known("dtype", [dtype], list(DTYPES))
    name = words.pop(0) if words and "=" not in words[0] else "gradients"
    _known("property", [name], list(_properties_of(op)))
    return op, dtype, name, " ".join(words)


def _bench(arguments: argparse.Namespace) -> int:
    ops = _known("operation", arguments.ops, list(backends.OPERATIONS))
    _known("dtype", [arguments.dtype], list(DTYPES))
    if not torch.cuda.is_available():
        raise UsageError("bench: torch finds no CUDA device; times on a CPU would mean nothing for these kernels")
    specs()
    _demand_writable(arguments.json)
    card = Card()  # first: a peer imported before CUDA is initialised could choose the allocator for all of them
    names, absent = _present(arguments.backend.split(","), "cuda")
    rates, state = card.rates(), card.state()
    print(heading(card, rates, state), flush=True)
    rows = []
    for shape in Bench(card, rates, names, arguments.dtype).shapes(ops):
        print(text(shape), flush=True)
        rows += shape
        if arguments.json:
            write_json(arguments.json, rows, card, rates, state, absent)
    if not rows:
        raise UsageError(f"backend: none of {', '.join(names)} defines any of {', '.join(ops)}: nothing to time")
    return 1 if any(row.failed for row in rows) else 0


def _fingerprint(arguments: argparse.Namespace) -> int:
    ops = _known("operation", arguments.ops, list(backends.OPERATIONS))
    _known("dtype", [arguments.dtype], list(DTYPES))
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    from conformance import fingerprint

    targets = _known("target", arguments.target, list(fingerprint.TARGETS))
    judged = backends.load(arguments.backend, "cuda")
    _demand_writable(arguments.json)
    print(fingerprint.heading(judged, targets, arguments.dtype), flush=True)
    found = []
    try:
        for prints in fingerprint.fingerprints(judged, ops, targets, arguments.dtype):
            print(fingerprint.text(prints), flush=True)
            found += prints
    except Failure as failure:
        raise UsageError(f"backend {arguments.backend} {failure}, on a CPU: nothing to compile") from failure
    if not found:
        raise UsageError(f"backend {arguments.backend} launches no Triton kernel for {', '.join(ops)}")
    if arguments.json:
        fingerprint.write_json(arguments.json, found, judged)
    return 1 if any(one.problem for one in found) else 0


def _present(names: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """The backends that can be imported, and why the others cannot; raises BackendError if none can."""
    present, absent = [], {}
    for name in dict.fromkeys(names):
        try:
            backends.load(name, device)
            present.append(name)
        except Absent as error:
            absent[name] = str(error)
    if not present:
        raise BackendError("; ".join(absent.values()))
    for why in absent.values():
        print(f"conformance: {why}: skipped", file=sys.stderr)
    return present, absent


def _judged(arguments: argparse.Namespace) -> tuple[str, Judged]:
    """The requested device and backend."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: got cuda, but torch finds no CUDA device; allowed here: cpu")
    return device, backends.load(arguments.backend, device)


def _demand_writable(path: Path | None) -> None:
    """Raise UsageError before any work if the results cannot be written."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    except OSError as error:
        raise UsageError(f"--json: got {path}; it cannot be written: {error.strerror}") from error


def _known(what: str, names: Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """The names, or all allowed names if none is given; raises UsageError for one that is not allowed."""
    for name in names or []:
        if name not in allowed:
            raise UsageError(f"{what}: got {name!r}; allowed: {', '.join(allowed)}")
    return list(dict.fromkeys(names or allowed))
