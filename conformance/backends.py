"""The backend under judgement: a name, or the dotted path of a module or object that defines operations."""

import importlib
import inspect
import os
import pkgutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import unsloth_ref.kernels
import unsloth_ref.training
from conformance import calling, interpreter, operations
from conformance.declarations import SpecError
from conformance.operations import PROJECT, Source
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
        description: its name, and the version and mode of Triton if a module that is loaded uses it.
    """

    name: str
    functions: dict[str, Function]
    description: str


@cache
def load(name: str, device: str, source: Source = PROJECT) -> Judged:
    """Import a backend, once.

    Args:
        name: one of NAMES, or a dotted path.
        device: "cpu" selects Triton's interpreter before triton is imported.
        source: of the operation, if it comes from the command line.

    Raises:
        Absent: a peer's package is not installed.
        BackendError: it cannot be imported, or defines nothing of the contract.
    """
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if device == "cpu" and find_spec("triton"):  # a backend may import it later, in a call
        interpreter.patch_for_speed()
        interpreter.compute_as_a_gpu()
        interpreter.tune_without_a_gpu()
        interpreter.count_launches()
    names = operations.specs(source) if source else (*operations.specs(), *PIECES)
    functions = (
        _stranger(name, source)
        if source
        else {op: getattr(namespace, op) for namespace in _namespaces(name) for op in names if hasattr(namespace, op)}
    )
    if not functions:
        error = Absent if name in PEERS else BackendError  # a peer may only have operations that the contract lacks
        raise error(f"backend: {name} defines no operation; the contract has {', '.join(names)}")
    for op, function in functions.items():
        with Caught() as caught:
            inspect.signature(function)
        if caught.error is not None:
            raise BackendError(f"backend: {name}.{op} is not a function with a signature: {describe(caught.error)}")
    description = name + _triton(device)
    return Judged(name, functions, description)


def _stranger(name: str, source: Source) -> dict[str, Function]:
    """The function that a backend has for the one operation of a source: of its name, or the backend itself."""
    ((op, spec),) = operations.specs(source).items()
    if name == "reference":
        return {op: spec.reference}
    if name in NAMES:
        raise BackendError(f"backend: got {name}; allowed for {op}: module:function, file.py:function, or reference")
    with Caught() as caught:
        found: Any = operations.resolve(name, "--backend")
        found = getattr(found, op) if hasattr(found, op) else found
        if not callable(found):
            raise BackendError(f"backend: {name} is no function and defines no {op}; allowed: module:function")
        return {op: calling.with_parameters_of(spec.reference, calling.as_function(found, op))}
    if isinstance(caught.error, (BackendError, SpecError)):
        raise BackendError(str(caught.error)) from caught.error
    raise BackendError(f"backend: {name} cannot be called as {op}: {describe(caught.error)}") from caught.error


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
    if name in (installed := operations.peers()):
        with Caught(SystemExit) as caught:
            return [installed[name].load()]
        raise Absent(f"backend: {name} cannot be imported: {describe(caught.error)}") from caught.error
    with Caught(SystemExit) as caught:
        return [pkgutil.resolve_name(name)]
    allowed = f"{', '.join(NAMES)}, or the dotted path of a module"
    why = describe(caught.error)
    raise BackendError(f"backend: got {name!r}, which cannot be imported ({why}); allowed: {allowed}") from caught.error


def _triton(device: str) -> str:
    """The version of Triton and whether it interprets, in parentheses; empty if only torch and the judge loaded it."""
    triton = sys.modules.get("triton")
    if triton is None or not any(_has(module, triton) for name, module in [*sys.modules.items()] if _is_others(name)):
        return ""
    return f" (Triton {triton.__version__}{', interpreter' if device == 'cpu' else ''})"


def _is_others(name: str) -> bool:
    return name.partition(".")[0] not in ("torch", "triton", "conformance")


def _has(module: object, triton: ModuleType) -> bool:
    """Whether the names of a module contain triton or its language."""
    names = getattr(module, "__dict__", {})
    return names.get("triton") is triton or names.get("tl") is sys.modules.get("triton.language", module)
