"""Writes docs/judge-power.md, and the measured error rates in docs/gate.md.

python -m tests.judge.power measure --device cuda --jobs 16 --json out/power.json
python -m conformance run --backend liger --json out/liger.json    # and other peers
python -m tests.judge.power write out/power.json out/liger.json ...
python -m tests.judge.power gate --minutes 7 --json out/gates.json                # needs a GPU of its own
python -m tests.judge.power gate --minutes 7 --first 7 --json out/more.json       # others; all files count together
python -m tests.judge.power write-gate out/gates.json out/more.json
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from conformance.backends import OPERATIONS
from tests.judge.power import document, gate, gate_document, measure


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(prog="python -m tests.judge.power")
    steps = parser.add_subparsers(required=True)
    first = steps.add_parser("measure", help="run the judge and the oracles on every wrong and every right kernel")
    first.add_argument("ops", nargs="*", help="operations (all)")
    first.add_argument("--kernel", nargs="+", help="names of kernels (all)")
    first.add_argument("--population", nargs="+", choices=document.POPULATIONS, default=document.POPULATIONS)
    first.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    first.add_argument("--profile", default="ci")
    first.add_argument("--jobs", type=int, default=2)
    first.add_argument("--json", type=Path, required=True)
    second = steps.add_parser("write", help="write the document from the results")
    second.add_argument("power", type=Path, help="the file that measure wrote")
    second.add_argument("peers", type=Path, nargs="*", help="files that `conformance run --json` wrote")
    second.add_argument("--to", type=Path, default=Path("docs/judge-power.md"))
    third = steps.add_parser("gate", help="run gates whose right verdict is known, on a GPU")
    third.add_argument("--gates", type=int, default=280, help="without those of wrong kernels (280)")
    third.add_argument("--minutes", type=float, default=7.0, help="after which none runs (7)")
    third.add_argument("--first", type=int, default=0, metavar="N", help="number of the first generation of gates (0)")
    third.add_argument("--json", type=Path, required=True)
    fourth = steps.add_parser("write-gate", help="write what gates found into the document")
    fourth.add_argument("gates_found", type=Path, nargs="+", help="files that gate wrote, of one card")
    fourth.add_argument("--to", type=Path, default=Path("docs/gate.md"))
    arguments = parser.parse_args()
    if "gates" in arguments:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        gate.measure(arguments.gates, arguments.minutes, arguments.first, arguments.json)
        sys.stdout.write(gate_document.text([_read(arguments.json)]) + "\n")
    elif "gates_found" in arguments:
        found = [_read(path) for path in arguments.gates_found]
        arguments.to.write_text(gate_document.into(arguments.to.read_text(), found))
    elif "power" in arguments:
        text = document.text(_read(arguments.power), [_read(peer) for peer in arguments.peers])
        arguments.to.write_text(text)
    else:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        chosen = [
            kernel
            for op in arguments.ops or OPERATIONS
            for kernel in measure.kernels(arguments.device)
            if kernel.op == op and kernel.population in arguments.population
            if not arguments.kernel or kernel.backend.rpartition(".")[2] in arguments.kernel
        ]
        measure.measure(chosen, arguments.device, arguments.profile, arguments.jobs, partial(_write, arguments.json))


def _write(path: Path, found: dict[str, object]) -> None:
    """Written after each kernel, so that a stopped run leaves what it found."""
    path.write_text(json.dumps(found, indent=1) + "\n")


def _read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


main()
