"""`conformance list`: what can be judged, by which properties."""

import argparse

from conformance import backends, operations
from conformance.pieces import pieces
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.reporting import report
from conformance.verbs._shared import Verbs, add_verb


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "list", "list operations, properties, training pieces, backends and profiles")
    parser.set_defaults(verb=_list)


def _list(arguments: argparse.Namespace) -> int:
    operations.install_properties()
    specs = operations.specs()
    width = report.name_width((*specs, *pieces()))
    print(
        "operations:",
        *(f"  {op:<{width}}{(s.reference.__doc__ or '').splitlines()[0]}" for op, s in specs.items()),
        sep="\n",
    )
    print(
        "properties:",
        *(f"  {name:<{width}}{prop.statement}" for name, prop in PROPERTIES.items()),
        sep="\n",
    )
    print("training pieces, each with its own properties:")
    for op, piece in pieces().items():
        print(f"  {op:<{width}}{(piece.reference.__doc__ or '').splitlines()[0]}")
        for name, prop in piece.properties.items():
            print(f"    {name:<30}{prop.statement}")
    print(
        "backends:", f"  {', '.join((*backends.NAMES, *operations.peers()))}, or the dotted path of a module", sep="\n"
    )
    print(
        "profiles:",
        *(f"  {name:<{width}}{profile.examples} examples" for name, profile in PROFILES.items()),
        sep="\n",
    )
    return 0
