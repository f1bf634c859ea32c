"""`conformance write`: print a spec of an operation, learned from its reference and an example, to be sharpened."""

import argparse

from conformance import operations
from conformance.verbs._shared import UsageError, Verbs, add_source, source_of
from conformance.writing import text


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("write", help="print a spec of an operation of your own, for you to edit")
    parser.add_argument("function", metavar="M:F", help="the reference: module:function or file.py:function")
    add_source(parser)
    parser.set_defaults(verb=_write)


def _write(arguments: argparse.Namespace) -> int:
    if arguments.reference or arguments.spec:
        raise UsageError("write: takes the reference without --reference, and no --spec")
    arguments.reference = arguments.function
    print(text(operations.learner(source_of(arguments)), arguments.function), end="")
    return 0
