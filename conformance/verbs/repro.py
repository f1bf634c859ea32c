"""`conformance repro`: run one case again, from the line that a failure printed."""

import argparse
from dataclasses import replace

from conformance import backends, operations
from conformance.case import DTYPES
from conformance.operations import Source
from conformance.pieces import pieces
from conformance.reporting import report
from conformance.running.catalogue import UsageError, judged_by, known, names_of, properties_of
from conformance.running.runner import Task, run
from conformance.verbs._shared import Verbs, add_backend, add_source, add_verb, source_of

LINE = "OP DTYPE [PROPERTY] NAME=VALUE ... or PIECE PROPERTY NAME=VALUE ..."


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "repro", "run one case again, from the line that a failure printed")
    parser.add_argument("line", help=f"in quotes: {LINE}")
    add_backend(parser)
    add_source(parser)
    parser.set_defaults(verb=_repro)


def _repro(arguments: argparse.Namespace) -> int:
    source = source_of(arguments)
    op, dtype, name, line = _parsed(arguments.line, source)
    try:
        case = pieces()[op].parse(line) if dtype is None else operations.specs(source)[op].parse(line)
    except ValueError as error:
        raise UsageError(str(error)) from error
    device, judged = judged_by(arguments.backend, arguments.device, source)
    if op not in judged.functions:
        raise UsageError(f"backend {arguments.backend} does not define {op}")
    task = Task(arguments.backend, op, name, dtype, device, case=case, source=source)
    ((_, result),) = run([task], lambda *_: None)
    if result.verdict == "fail":
        print(report.failures([replace(result, case=str(case))], arguments.backend, device, source))
        return 1
    if result.verdict == "skip":
        raise UsageError(f"{name}: {result.message}")
    used = f", {100 * result.budget_use:.3g} % of the budget" if result.budget_use is not None else ""
    again = " ".join((op, *((dtype,) if dtype else ()), name, str(case)))
    print(f"ok   {' / '.join((op, name, *((dtype,) if dtype else ())))}: {case}{used}")
    print(f"  reproduce:     {report.repro(again, arguments.backend, device, source.words())}")
    return 0


def _parsed(line: str, source: Source) -> tuple[str, str | None, str, str]:
    """Operation or piece, dtype, property and case from a line that a failure printed."""
    op, *words = line.split() or [""]
    by_name = [word for word in words if "=" not in word]  # dtype and property; a piece has no dtype
    if not words or (op in backends.PIECES and len(by_name) != 1):
        raise UsageError(f"repro: got {line!r}; allowed: '{LINE}'")
    ops, piece_names = names_of(source)
    known("operation", [op], [*ops, *piece_names])
    dtype = None
    if op in ops:
        dtype = words.pop(0)
        known("dtype", [dtype], list(DTYPES))
    name = words.pop(0) if words and "=" not in words[0] else "gradients"
    known("property", [name], list(properties_of(op)))
    return op, dtype, name, " ".join(words)
