"""Who is judged: a name, or the dotted path of a module (or an object in one) that defines some of the contract."""

import importlib
import inspect
import os
import pkgutil
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import unsloth_ref.kernels
import unsloth_ref.training
from conformance import interpreter
from conformance.peers import Absent
from conformance.trial import BackendError, Function, Raised, describe

OPERATIONS = tuple(unsloth_ref.kernels.__all__)
PIECES = tuple(unsloth_ref.training.__all__)
PEERS = ("compile", "torch", "varlen", "liger", "unsloth", "cce")
NAMES = ("fast", "reference", *PEERS)
# No Triton of their own: on a CPU torch.compile writes C++.
COMPILED_OR_EAGER = ("reference", "compile", "torch", "varlen")


@dataclass(frozen=True)
class Judged:
    """A backend under judgement.

    Attributes:
        name: as given on the command line.
        functions: its operations and training pieces by name; what it does not define is absent.
        description: its name, and what it runs on.
        truncates: whether its casts to bfloat16 may truncate, as Triton's interpreter's do: whether triton was loaded
            with it, or before it.
    """

    name: str
    functions: dict[str, Function]
    description: str
    truncates: bool


@cache
def load(name: str, device: str) -> Judged:
    """Import a backend, once.

    Args:
        name: one of NAMES, or a dotted path.
        device: "cpu" runs Triton kernels in its interpreter, which is chosen here, before triton is imported.

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
        kind = Absent if name in PEERS else BackendError  # whose operation the contract has not got yet
        raise kind(f"backend: {name} defines no operation; the contract has {', '.join((*OPERATIONS, *PIECES))}")
    for op, function in functions.items():
        with Raised() as raised:
            inspect.signature(function)
        if raised.error is not None:
            raise BackendError(f"backend: {name}.{op} is no function with a signature: {describe(raised.error)}")
    # Dynamo imports triton too.
    interpreted = device == "cpu" and name not in COMPILED_OR_EAGER and "triton" in sys.modules
    if interpreted:
        interpreter.patch()
    return Judged(name, functions, f"{name}{_runs_on(interpreted)}", interpreted)


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
    with Raised(SystemExit) as raised:
        return [pkgutil.resolve_name(name)]
    allowed = f"{', '.join(NAMES)}, or the dotted path of a module"
    why = describe(raised.error)
    raise BackendError(f"backend: got {name!r}, which cannot be imported ({why}); allowed: {allowed}") from raised.error


def _runs_on(interpreted: bool) -> str:
    if "triton" not in sys.modules:
        return ""
    return f" (Triton {sys.modules['triton'].__version__}{', interpreter' if interpreted else ''})"
