"""Writes docs/judge-power.md.

python -m tests.judge.power measure --device cuda --jobs 16 --json out/power.json
python -m conformance run --backend liger --profile gpu --json out/liger.json    # and other peers
python -m conformance mutate --json out/mutants.json
python -m tests.judge.power write out/power.json out/liger.json ... out/mutants.json

`measure` may be run in parts: `write` takes any number of its files.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from conformance import results_file
from conformance.backends import OPERATIONS
from tests.judge.power import document, measure


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(prog="python -m tests.judge.power")
    steps = parser.add_subparsers(required=True)
    first = steps.add_parser("measure", help="run the judge and the oracles on every wrong and every right kernel")
    first.add_argument("ops", nargs="*", help="operations (all)")
    first.add_argument(
        "--population", nargs="+", choices=list(document.POPULATIONS), default=list(document.POPULATIONS)
    )
    first.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    first.add_argument("--profile", default="ci")
    first.add_argument("--jobs", type=int, default=2)
    first.add_argument("--json", type=Path, required=True)
    second = steps.add_parser("write", help="write the document from the results")
    second.add_argument("files", type=Path, nargs="+", help="what measure, and conformance's run and mutate, wrote")
    second.add_argument("--to", type=Path, default=Path("docs/judge-power.md"))
    arguments = parser.parse_args()
    if "files" in arguments:
        files = {path.stem: json.loads(path.read_text()) for path in arguments.files}
        measured = [file for file in files.values() if "kernels" in file]
        if len({(file["meta"]["device"], file["meta"]["profile"]) for file in measured}) != 1:
            parser.error("files: need what measure wrote, on one device under one profile")
        mutants = [file for file in files.values() if "kill_rate" in file["meta"]]
        peers = {name: file for name, file in files.items() if file not in measured and file not in mutants}
        results_file.write_text(arguments.to, document.text(measured, peers, mutants))
    else:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        chosen = [
            kernel
            for op in arguments.ops or OPERATIONS
            for kernel in measure.kernels()
            if kernel.op == op and kernel.population in arguments.population
        ]
        measure.measure(chosen, arguments.device, arguments.profile, arguments.jobs, partial(_write, arguments.json))


def _write(path: Path, found: dict[str, object]) -> None:
    """Written after each kernel, so that a stopped run leaves what it found."""
    results_file.write_text(path, json.dumps(found, indent=1) + "\n")


main()
