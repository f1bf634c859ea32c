"""`conformance ledger`: record the best results of a card in a committed file, and show them."""

import argparse
from pathlib import Path

from conformance.gate import ledger
from conformance.gate.ledger import Entry, Ledger, LedgerError
from conformance.gate.verdict import name
from conformance.running.catalogue import UsageError
from conformance.verbs._shared import Verbs, add_verb

FOLDER = Path("ledger")


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "ledger", "record the best results of a card, or show them")
    parser.add_argument("action", choices=("update", "show"), help="record results, or show what is recorded")
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="files of results to record, or ledgers to show (all)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"folder of the ledgers ({FOLDER})")
    parser.add_argument("--because", metavar="TEXT", help="record worse results too, for this reason")
    parser.set_defaults(verb=_ledger)


def _ledger(arguments: argparse.Namespace) -> int:
    try:
        return _update(arguments) if arguments.action == "update" else _show(arguments)
    except LedgerError as error:
        raise UsageError(str(error)) from error


def _update(arguments: argparse.Namespace) -> int:
    if not arguments.files:
        raise UsageError("ledger update: got no file; allowed: files that run, bench, fingerprint or gate wrote")
    if arguments.because is not None and not arguments.because.strip():
        raise UsageError("--because: got an empty text; allowed: a reason")
    ledgers: dict[Path, Ledger] = {}
    changed = dict[Path, int]()
    refused: list[str] = []
    for file in arguments.files:
        results = ledger.results_in(file)
        path = arguments.folder / ledger.file_name(results.card)
        if path not in ledgers:
            ledgers[path] = ledger.read(path) if path.exists() else Ledger(results.card)
        if ledgers[path].card != results.card:
            raise UsageError(f"{file}: got results of {results.card}; allowed: of {ledgers[path].card}, as {path}")
        count, sentences = ledgers[path].update(results, arguments.because)
        changed[path] = changed.get(path, 0) + count
        refused += sentences
    if refused:  # then no file is written
        print(*(f"FAIL {sentence}" for sentence in refused), sep="\n")
        print(f"worse than recorded: {len(refused)}; nothing is recorded; --because TEXT records them with the reason")
        return 1
    for path, one in ledgers.items():
        try:
            if changed[path]:
                one.write(path)
        except OSError as error:
            raise UsageError(f"--folder: {path} cannot be written: {error.strerror}") from error
        print(f"{path}: {changed[path]} of {len(one.entries)} entries changed")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    files = arguments.files or sorted(arguments.folder.glob("*.json"))
    if not files:
        raise UsageError(f"ledger show: got no ledger in {arguments.folder}; allowed: files, or --folder")
    for file in files:
        one = ledger.read(file)
        print(f"{file}: {one.card}, {len(one.entries)} entries")
        for key, environment in one.environments.items():
            print(
                f"  {key}: {', '.join(f'{what} {value}' for what, value in environment.items() if value is not None)}"
            )
        for entry in one.entries.values():
            print(f"  {entry['environment']} {entry['backend']}: {name(entry['kind'], entry)}: {_values(entry)}")
    return 0


def _values(entry: Entry) -> str:
    because = f" (because {entry['because']})" if entry["because"] else ""
    if entry["kind"] == "property":
        used = entry["budget_use"]
        return ("holds" if used is None else f"{100 * used:.3g} % of the error budget") + because
    if entry["kind"] == "time":
        shares = entry["roofline"]
        words = [
            f"{kind} {milliseconds:.4f} ms" + (f" {100 * shares[kind]:.0f} %" if kind in shares else "")
            for kind, milliseconds in entry["milliseconds"].items()
        ]
        memory = [] if entry["peak_mebibytes"] is None else [f"peak {entry['peak_mebibytes']:.0f} MiB"]
        return ", ".join(words + memory) + because
    return ", ".join(f"{what} {entry[what]}" for what in ledger.FINGERPRINT) + because
