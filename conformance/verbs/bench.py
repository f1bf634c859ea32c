"""`conformance bench`: compare the speed of backends on a GPU."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conformance import backends
from conformance.bench import exchange
from conformance.bench.card import Card
from conformance.bench.measure import Bench
from conformance.bench.plot import lacking, plot
from conformance.bench.table import heading, text, write_json
from conformance.case import DTYPES
from conformance.peers import Absent
from conformance.running.catalogue import UsageError, known
from conformance.specs import specs
from conformance.trial import BackendError
from conformance.verbs._shared import Verbs, add_verb, demand_writable

BENCHED = "reference,compile,torch,fast"


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "bench", "compare the speed of backends on a GPU")
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations (all)")
    parser.add_argument("--backend", default=BENCHED, metavar="A,B,...", help=f"backends ({BENCHED})")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the inputs (bfloat16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the times to this file")
    parser.add_argument(
        "--benchmark-json", type=Path, metavar="FILE", help="also write the times in pytest-benchmark's format"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the times: a .png, .svg or .pdf (matplotlib)"
    )
    parser.set_defaults(verb=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    ops = known("operation", arguments.ops, list(backends.OPERATIONS))
    known("dtype", [arguments.dtype], list(DTYPES))
    if not torch.cuda.is_available():
        raise UsageError("bench: torch finds no CUDA device; times on a CPU would mean nothing for these kernels")
    specs()
    demand_writable(arguments.json)
    if arguments.benchmark_json and (why := exchange.lacking()):
        raise UsageError(f"--benchmark-json: {why}")
    demand_writable(arguments.benchmark_json, "--benchmark-json")
    if arguments.plot and (why := lacking(arguments.plot)):
        raise UsageError(f"--plot: {why}")
    demand_writable(arguments.plot, "--plot")
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
        if arguments.benchmark_json:
            exchange.write(arguments.benchmark_json, rows, card, state)
    if not rows:
        raise UsageError(f"backend: none of {', '.join(names)} defines any of {', '.join(ops)}: nothing to time")
    if arguments.plot:
        plot(arguments.plot, rows, heading(card, rates, state).partition("\n")[0])
    return 1 if any(row.failed for row in rows) else 0


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
