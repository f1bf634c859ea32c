"""`conformance fingerprint`: registers, spills and the like of Triton kernels, without a GPU."""

import argparse
import os
from pathlib import Path

from conformance import backends, operations
from conformance.case import DTYPES
from conformance.running.catalogue import UsageError, known
from conformance.tolerances.gates import Failure
from conformance.verbs._shared import Verbs, add_source, add_verb, demand_at_least, demand_writable, source_of


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "fingerprint", "show registers, spills and the like of Triton kernels; needs no GPU")
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations (all)")
    targets = "sm_80, sm_86, sm_90, sm_100, sm_120, gfx942"
    parser.add_argument("--target", nargs="+", action="extend", metavar="T", help=f"{targets} (all)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the inputs (bfloat16)")
    parser.add_argument("--backend", default="fast", help="fast, or a dotted path (fast)")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="also draw N cases; show what fails in them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add_source(parser)
    parser.set_defaults(verb=_fingerprint)


def _fingerprint(arguments: argparse.Namespace) -> int:
    demand_at_least(arguments, cases=0)
    source = source_of(arguments)
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
    specs = operations.specs(source)
    ops = known("operation", arguments.ops, list(specs))
    known("dtype", [arguments.dtype], list(DTYPES))
    from conformance import fingerprint
    from conformance.interpreter.tuning import describe_a_gpu
    from conformance.reporting import report

    describe_a_gpu()
    targets = known("target", arguments.target, list(fingerprint.TARGETS))
    judged = backends.load(arguments.backend, "cuda", source)
    demand_writable(arguments.json)
    print(fingerprint.heading(judged, targets, arguments.dtype), flush=True)
    found = []
    try:
        chosen = [specs[op] for op in ops]
        for prints in fingerprint.fingerprints(judged, chosen, targets, arguments.dtype, arguments.cases):
            print(fingerprint.text(prints), flush=True)
            found += prints
    except Failure as failure:
        why = f"{failure}, on a CPU: nothing to compile"
        hints = "".join(f"; hint: {hint}" for hint in report.hints_of(str(failure), "cuda", source))
        raise UsageError(f"backend {arguments.backend} {why}{hints}") from failure
    if not found:
        raise UsageError(f"backend {arguments.backend} launches no Triton kernel for {', '.join(ops)}")
    if arguments.cases:
        own = {(op, shape) for op in ops for shape in ("example", *specs[op].speed.shapes)}
        failing = len({(one.op, one.shape) for one in found} - own)
        print(f"drawn cases: {failing} fail, of {arguments.cases} for each operation")
    if arguments.json:
        fingerprint.write_json(arguments.json, found, judged)
    return 1 if any(one.problem for one in found) else 0
