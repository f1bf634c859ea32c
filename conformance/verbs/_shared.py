"""What several verbs share: usage errors, names that must be known, the requested backend, the file of results."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from conformance import backends
from conformance.backends import Judged
from conformance.pieces import pieces
from conformance.properties import PROPERTIES

Verbs = Any  # argparse's action that adds the parsers of verbs; it has no public name


class UsageError(Exception):
    """A command line that cannot be run; the message states the value seen and the allowed values."""


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add the options that select what is judged, and where."""
    parser.add_argument("--backend", default="fast", help=f"{', '.join(backends.NAMES)}, or a dotted path (fast)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is a CUDA device)")


def judged_by(arguments: argparse.Namespace) -> tuple[str, Judged]:
    """The requested device and backend."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: got cuda, but torch finds no CUDA device; allowed here: cpu")
    return device, backends.load(arguments.backend, device)


def properties_of(op: str) -> Collection[str]:
    """The names of the properties of an operation or piece."""
    return PROPERTIES if op in backends.OPERATIONS else pieces()[op].properties


def demand_writable(path: Path | None) -> None:
    """Raise UsageError before any work if the results cannot be written."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    except OSError as error:
        raise UsageError(f"--json: got {path}; it cannot be written: {error.strerror}") from error


def known(what: str, names: Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """The names, or all allowed names if none is given; raises UsageError for one that is not allowed."""
    for name in names or []:
        if name not in allowed:
            raise UsageError(f"{what}: got {name!r}; allowed: {', '.join(allowed)}")
    return list(dict.fromkeys(names or allowed))
