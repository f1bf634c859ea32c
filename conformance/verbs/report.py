"""`conformance report`: show files of results as a page, as the comment of a pull request or as JUnit's XML."""

import argparse
from pathlib import Path

from conformance.gate.history import points
from conformance.gate.ledger import LedgerError
from conformance.page.compare import FACTOR, changes
from conformance.page.html import page
from conformance.page.junit import junit
from conformance.page.markdown import comment
from conformance.page.reading import FileError, read
from conformance.reporting import results_file
from conformance.running.catalogue import UsageError
from conformance.verbs._shared import Verbs, add_verb, demand_writable

FORMATS = ("html", "markdown", "junit")
SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".xml": "junit"}


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "report", "show files of results as a page, a pull request's comment or JUnit's XML")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="files of results, as --json writes them")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the file to write (standard output)")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the output (by the suffix of -o: .html, .md, .xml; else html)"
    )
    parser.add_argument(
        "--base", nargs="+", action="extend", type=Path, metavar="FILE", help="older results, to report what changed"
    )
    parser.add_argument(
        "--history",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="LEDGER",
        help="add the history of a ledger, from its git revisions, or of several ledgers",
    )
    parser.add_argument(
        "--factor",
        type=float,
        default=FACTOR,
        metavar="F",
        help=f"factor by which a time must change to count ({FACTOR})",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything regressed against the base")
    parser.set_defaults(verb=_report)


def _report(arguments: argparse.Namespace) -> int:
    suffix = arguments.output.suffix.lower() if arguments.output else ""
    name = arguments.format or SUFFIXES.get(suffix, "html")
    if arguments.base and name == "junit":
        raise UsageError("--base: got format junit, which has no changes; allowed: html, markdown")
    if not arguments.files and not arguments.history:
        raise UsageError("report: got no FILE; allowed: files that --json of a verb wrote, or --history LEDGER")
    if arguments.history and name != "html":
        raise UsageError(f"--history: got format {name}; allowed: html")
    if not arguments.factor > 1:
        raise UsageError(f"--factor: got {arguments.factor}; allowed: a number above 1, such as 1.1")
    try:
        files, base = ([read(path) for path in paths or ()] for paths in (arguments.files, arguments.base))
        ledgers = points(arguments.history) if arguments.history else []
    except (FileError, LedgerError) as error:
        raise UsageError(f"report: {error}") from error
    if arguments.output and arguments.output.resolve() in [
        path.resolve() for path in (*arguments.files, *(arguments.base or ()), *arguments.history)
    ]:
        raise UsageError(f"--output: got {arguments.output}, a file of results; allowed: another file")
    if arguments.check and not arguments.base and all(file.kind != "gate" for file in files):
        raise UsageError("--check: got nothing to compare with; allowed: with --base, or with the file of a gate")
    against = base if arguments.base else None
    if name == "html":
        text = page(files, against, ledgers, arguments.factor)
    else:
        text = comment(files, against, arguments.factor) if name == "markdown" else junit(files)
    found = changes(files, against, arguments.factor) if arguments.check else []
    status = int(any(change.word == "regressed" for change in found))
    if arguments.output is None:
        print(text, end="")
        return status
    demand_writable(arguments.output, "--output")
    results_file.write_text(arguments.output, text)
    return status
