"""The backend under judgement: a name, or the dotted path of a module or object that defines operations."""

import importlib
import inspect
import os
import pkgutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import unsloth_ref.kernels
import unsloth_ref.training
from conformance import interpreter
from conformance.peers import PACKAGES, Absent
from conformance.trial import BackendError, Caught, Function, describe

OPERATIONS = tuple(unsloth_ref.kernels.__all__)
PIECES = tuple(unsloth_ref.training.__all__)
PEERS = tuple(PACKAGES)
NAMES = ("fast", "reference", *PEERS)


@dataclass(frozen=True)
class Judged:
    """A backend under judgement.

    Attributes:
        name: from the command line.
        functions: its operations and training pieces by name; those that it does not define are absent.
        description: its name, and the version and mode of Triton if importing it loads Triton.
    """

    name: str
    functions: dict[str, Function]
    description: str


@cache
def load(name: str, device: str) -> Judged:
    """Import a backend, once.

    Args:
        name: one of NAMES, or a dotted path.
        device: "cpu" selects Triton's interpreter before triton is imported.

    Raises:
        Absent: a peer's package is not installed.
        BackendError: it cannot be imported, or defines nothing of the contract.
    """
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    functions = {
        op: getattr(namespace, op)
        for namespace in _namespaces(name)
        for op in (*OPERATIONS, *PIECES)
        if hasattr(namespace, op)
    }
    if not functions:
        error = Absent if name in PEERS else BackendError  # a peer may only have operations that the contract lacks
        raise error(f"backend: {name} defines no operation; the contract has {', '.join((*OPERATIONS, *PIECES))}")
    for op, function in functions.items():
        with Caught() as caught:
            inspect.signature(function)
        if caught.error is not None:
            raise BackendError(f"backend: {name}.{op} is not a function with a signature: {describe(caught.error)}")
    description = name + _triton(device)
    if device == "cpu" and find_spec("triton"):  # a backend may import it later, in a call
        interpreter.patch_for_speed()
        interpreter.count_launches()
    return Judged(name, functions, description)


def _namespaces(name: str) -> list[Any]:
    if name == "reference":
        return [unsloth_ref.kernels, unsloth_ref.training]
    if name == "fast":
        return [importlib.import_module(f"unsloth_fast.{part}") for part in ("kernels", "training")]
    if name in PEERS:
        try:
            return [importlib.import_module(f"conformance.peers.{name}")]
        except Absent as absent:
            raise Absent(f"backend: {name} {absent}") from absent
    with Caught(SystemExit) as caught:
        return [pkgutil.resolve_name(name)]
    allowed = f"{', '.join(NAMES)}, or the dotted path of a module"
    why = describe(caught.error)
    raise BackendError(f"backend: got {name!r}, which cannot be imported ({why}); allowed: {allowed}") from caught.error


def _triton(device: str) -> str:
    """The version of Triton and whether it interprets, in parentheses; empty if triton is not loaded."""
    if "triton" not in sys.modules:
        return ""
    return f" (Triton {sys.modules['triton'].__version__}{', interpreter' if device == 'cpu' else ''})"
