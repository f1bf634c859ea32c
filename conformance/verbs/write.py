"""`conformance write`: print a spec of an operation, learned from its reference and an example."""

import argparse

from conformance import operations
from conformance.learning.writing import text
from conformance.verbs._shared import Verbs, add_example, add_verb, source_of


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "write", "print a spec of an operation of your own, for you to edit")
    parser.add_argument("reference", metavar="M:F", help="its definition: module:function or file.py:function")
    add_example(parser)
    parser.set_defaults(verb=_write, spec=None)


def _write(arguments: argparse.Namespace) -> int:
    print(text(operations.learner(source_of(arguments)), arguments.reference), end="")
    return 0
