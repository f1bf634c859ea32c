"""The command line. Each verb is a file of conformance/verbs.

Exit status: 0 if everything passed, 1 if something failed, 2 for a usage error or if nothing ran. A usage error is
reported in one line.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from conformance.declarations import SpecError
from conformance.running.catalogue import UsageError
from conformance.trial import BackendError
from conformance.verbs import (
    bench,
    bisect,
    coverage,
    fingerprint,
    gate,
    ledger,
    listing,
    model,
    mutate,
    report,
    repro,
    run,
    write,
)

VERBS = (run, model, bisect, listing, repro, write, coverage, bench, fingerprint, mutate, gate, ledger, report)


class _Parser(argparse.ArgumentParser):
    """Prints one line per error instead of the usage text."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that worker processes are stopped
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
    parser = _Parser(
        prog="conformance",
        description="Judge kernels against the reference, and time them.",
        epilog="Exit status: 0 if everything passed, 1 if something failed, 2 for a usage error or if nothing ran.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    for verb in VERBS:
        verb.add(verbs)
    return parser
