"""`conformance list`: what can be judged, by which properties."""

import argparse

from conformance import backends, report
from conformance.pieces import pieces
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.specs import specs
from conformance.verbs._shared import Verbs


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("list", help="list operations, properties, training pieces, backends and profiles")
    parser.set_defaults(verb=_list)


def _list(arguments: argparse.Namespace) -> int:
    print(
        "operations:",
        *(f"  {op:<{report.NAME_WIDTH}}{(s.reference.__doc__ or '').splitlines()[0]}" for op, s in specs().items()),
        sep="\n",
    )
    print(
        "properties:",
        *(f"  {name:<{report.NAME_WIDTH}}{prop.statement}" for name, prop in PROPERTIES.items()),
        sep="\n",
    )
    print("training pieces, each with its own properties:")
    for op, piece in pieces().items():
        print(f"  {op:<{report.NAME_WIDTH}}{(piece.reference.__doc__ or '').splitlines()[0]}")
        for name, prop in piece.properties.items():
            print(f"    {name:<30}{prop.statement}")
    print("backends:", f"  {', '.join(backends.NAMES)}, or the dotted path of a module", sep="\n")
    print(
        "profiles:",
        *(f"  {name:<{report.NAME_WIDTH}}{profile.examples} examples" for name, profile in PROFILES.items()),
        sep="\n",
    )
    return 0
