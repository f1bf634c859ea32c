"""What several verbs share: parsers and options, and what they demand of them."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from conformance import backends
from conformance.case import DTYPES
from conformance.operations import Source
from conformance.profiles import PROFILES
from conformance.running.catalogue import UsageError

Verbs = Any  # argparse's action that adds the parsers of verbs; it has no public name


def add_verb(verbs: Verbs, name: str, what: str) -> argparse.ArgumentParser:
    """Add the parser of a verb; `what` states in a sentence what the verb does."""
    return verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add the options that select what is judged, and where."""
    parser.add_argument("--backend", default="fast", help=f"{', '.join(backends.NAMES)}, or a dotted path (fast)")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that selects the device."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (cuda if there is a CUDA device)")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options of a search: how many cases, in which dtypes, under which properties."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations, and training pieces where they apply (all)")
    parser.add_argument("--profile", default="ci", choices=PROFILES, help="how many cases to draw (ci)")
    parser.add_argument("--dtype", nargs="+", action="extend", metavar="D", help=f"{', '.join(DTYPES)} (all)")
    parser.add_argument("--property", nargs="+", action="extend", metavar="P", help="properties, see list (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add_backend(parser)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an operation of your own."""
    group = parser.add_argument_group("an operation of your own")
    group.add_argument("--reference", metavar="M:F", help="its definition: module:function or file.py:function")
    group.add_argument("--spec", metavar="SPEC", help="a module or file with a spec, in place of definition and call")
    add_example(group)


def add_example(group: Any) -> None:
    """Add the options that describe an operation of your own to a parser or a group of one."""
    group.add_argument("--example", metavar="CALL", help="'x=randn(64,128) eps=1e-6', or a file that defines example")
    group.add_argument("--in-place", metavar="X,...", type=_names, default=(), help="inputs that it changes on purpose")
    group.add_argument("--rows", metavar="X,...", type=_names, default=(), help="inputs with independent rows")
    group.add_argument("--grads", metavar="X,...", type=_names, help="inputs to differentiate, or none (all)")


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def source_of(arguments: argparse.Namespace) -> Source:
    """The operation that the command line names; raises UsageError."""
    if arguments.spec and (arguments.reference or arguments.example):
        raise UsageError("--spec: takes the place of --reference and --example")
    if not arguments.spec and not arguments.reference:
        for flag in ("example", "in_place", "rows", "grads"):
            if getattr(arguments, flag):
                raise UsageError(f"--{flag.replace('_', '-')}: needs --reference, the operation's definition")
    return Source(
        arguments.reference, arguments.example, arguments.spec, arguments.in_place, arguments.rows, arguments.grads
    )


def demand_writable(path: Path | None, flag: str = "--json") -> None:
    """Raise UsageError before any work if the results cannot be written."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if path.is_file():  # it is replaced as a whole, by a new file of its folder
                tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise UsageError(f"{flag}: got {path}; it cannot be written: {error.strerror}") from error


def demand_at_least(arguments: argparse.Namespace, **least: float) -> None:
    """Raise UsageError for an option whose number is below its least value."""
    for name, allowed in least.items():
        given = getattr(arguments, name)
        if given is not None and not given >= allowed:
            raise UsageError(f"--{name.replace('_', '-')}: got {given}; allowed: {allowed} or more")
