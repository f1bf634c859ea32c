"""How often is the judge wrong, and how often the gate? Measures both, and writes the results into documents.

    python -m tests.judge.power measure --device cuda --jobs 16 --json out/power.json
    python -m conformance run --backend liger --profile gpu --json out/liger.json     # and other peers
    python -m conformance mutate --json out/mutants.json
    python -m tests.judge.power brief out/mutants.json --json out/mutants_cpu.json    # what write needs of it
    python -m tests.judge.power write out/power.json out/liger.json ... out/mutants_cpu.json survivors.toml
    python -m tests.judge.power gate --minutes 7 --json out/gates.json                # needs a GPU of its own
    python -m tests.judge.power gate --minutes 7 --first 10 --json out/more.json      # more gates, in another order
    python -m tests.judge.power write-gate out/gates.json out/more.json

`write` makes docs/judge-power.md; a TOML file says why mutants survive, `[[survivor]]` with `mutant` and `reason`.
`write-gate` writes the measured error rates into docs/gate.md. Both take several files.
Populations may be measured on different devices, each on one: `measure --population right --device cuda`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conformance.backends import OPERATIONS
from conformance.reporting import results_file
from tests.judge.power import automatic, document, gate, gate_document, measure


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(prog="python -m tests.judge.power")
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("measure", help="run the judge and the oracles on every wrong and every right kernel")
    first.add_argument("ops", nargs="*", help="operations (all)")
    first.add_argument("--kernel", nargs="+", help="names of kernels (all)")
    populations = list(document.POPULATIONS)
    first.add_argument("--population", nargs="+", choices=populations, default=populations, help="(all)")
    first.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    first.add_argument("--profile", default="ci", help="how many cases (ci)")
    first.add_argument("--jobs", type=int, default=2, help="worker processes (2)")
    first.add_argument("--json", type=Path, required=True)
    second = steps.add_parser("write", help="write the document from the results")
    second.add_argument("files", type=Path, nargs="+", help="what measure, and conformance's run and mutate, wrote")
    second.add_argument("--to", type=Path, default=Path("docs/judge-power.md"), help="(docs/judge-power.md)")
    brief = steps.add_parser("brief", help="shorten what conformance's mutate wrote to what write needs")
    brief.add_argument("mutants", type=Path)
    brief.add_argument("--note", default="", help="how the mutants were examined, for the document")
    brief.add_argument("--json", type=Path, required=True)
    third = steps.add_parser("gate", help="run gates whose right verdict is known, on a GPU")
    third.add_argument("--gates", type=int, default=250, help="number of gates, without those of wrong kernels (250)")
    third.add_argument("--minutes", type=float, default=7.0, help="time limit of all gates (7)")
    third.add_argument("--first", type=int, default=0, metavar="N", help="number of the first generation of gates (0)")
    third.add_argument("--json", type=Path, required=True)
    fourth = steps.add_parser("write-gate", help="write the measured error rates into the document")
    fourth.add_argument("files", type=Path, nargs="+", help="files that gate wrote, of one card")
    fourth.add_argument("--to", type=Path, default=Path("docs/gate.md"), help="(docs/gate.md)")
    arguments = parser.parse_args()
    if arguments.step == "gate":
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        gate.measure(arguments.gates, arguments.minutes, arguments.first, arguments.json)
        sys.stdout.write(gate_document.text([_read(arguments.json)]) + "\n")
    elif arguments.step == "write-gate":
        found = [_read(path) for path in arguments.files]
        arguments.to.write_text(gate_document.into(arguments.to.read_text(), found))
    elif arguments.step == "write":
        _write_document(parser, arguments.files, arguments.to)
    elif arguments.step == "brief":
        results_file.write_text(arguments.json, automatic.brief(_read(arguments.mutants), arguments.note))
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


def _write_document(parser: argparse.ArgumentParser, paths: Sequence[Path], to: Path) -> None:
    reasons = {name: why for path in paths if path.suffix == ".toml" for name, why in automatic.reasons(path).items()}
    files = {path.stem: _read(path) for path in paths if path.suffix != ".toml"}
    measured = [file for file in files.values() if "kernels" in file]
    if len({file["meta"]["profile"] for file in measured}) != 1:
        parser.error("files: need what measure wrote, under one profile")
    if several := [name for name, devices in document.device_of(measured).items() if len(devices) > 1]:
        parser.error(f"files: got {', '.join(several)} on several devices; allowed: one for each population")
    mutants = [file for file in files.values() if "kill_rate" in file["meta"]]
    peers = {name: file for name, file in files.items() if file not in measured and file not in mutants}
    results_file.write_text(to, document.text(measured, peers, mutants, reasons))


def _write(path: Path, found: dict[str, object]) -> None:
    """Written after each kernel, so that a stopped run leaves what it found."""
    results_file.write_text(path, json.dumps(found, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


main()
