"""Which operations are under judgement: the project's, those of installed packages, or one from the command line.

A package takes part through entry points:

    [project.entry-points."conformance.specs"]         # name = a module with a `spec`, or a Spec
    softmax = "their_kernels.conformance.softmax"
    [project.entry-points."conformance.properties"]    # name = a module with a `PROPERTY`, or a Property
    keeps_sum = "their_kernels.conformance.keeps_sum"
    [project.entry-points."conformance.peers"]         # name = a module that defines operations
    their_kernels = "their_kernels.ops"
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from conformance import calling
from conformance import specs as own
from conformance.declarations import SpecError
from conformance.interpreter.tuning import describe_a_gpu
from conformance.learning import example, learn
from conformance.properties import PROPERTIES
from conformance.property import Property
from conformance.spec import Spec
from conformance.trial import Caught, describe

WITHOUT = "CONFORMANCE_WITHOUT"  # names of entry points that are left out, as the gate's base has another package


@dataclass(frozen=True)
class Source:
    """Where an operation comes from, in the words of the command line, so that every process can load it.

    Attributes:
        reference: the function that defines it, "module:function".
        example: an example call, see conformance/learning/example.py.
        spec: a file or module with a `spec`, which takes the place of both.
        in_place, rows: inputs that it changes on purpose, and whose first dimension counts independent rows.
        grads: inputs to differentiate; None for all that the reference differentiates.
    """

    reference: str | None = None
    example: str | None = None
    spec: str | None = None
    in_place: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    grads: tuple[str, ...] | None = None

    def __bool__(self) -> bool:
        """Whether the operation comes from the command line."""
        return bool(self.reference or self.spec)

    def words(self) -> list[str]:
        """The options of the command line that give this source."""
        lists = (("--in-place", self.in_place), ("--rows", self.rows), ("--grads", self.grads))
        found = [
            word
            for flag, value in (("--reference", self.reference), ("--example", self.example), ("--spec", self.spec))
            if value
            for word in (flag, value)
        ]
        for flag, names in lists:
            if names or (flag == "--grads" and names is not None):
                found += [flag, ",".join(names) or "none"]
        return found


PROJECT = Source()  # the operations of the project and of installed packages


def specs(source: Source = PROJECT) -> Mapping[str, Spec]:
    """The specs under judgement, by the name of the operation.

    Raises:
        SpecError: one cannot be loaded, or two have the same name.
    """
    if source:
        spec = _from(source)
        return {spec.op: spec}
    found = dict(own.specs())
    for name, spec in _installed():
        if spec.op in found:
            raise SpecError(f"entry point {name}: an operation is called {spec.op} already")
        found[spec.op] = spec
    return found


@cache
def _from(source: Source) -> Spec:
    if source.spec:
        return _spec(resolve(source.spec, "--spec"), source.spec)
    return learner(source).spec()


@cache
def _installed() -> list[tuple[str, Spec]]:
    return [(point.name, _spec(_loaded(point), f"entry point {point.name}")) for point in _points("specs")]


def learner(source: Source) -> learn.Learner:
    """The learner of the operation that the command line names; raises SpecError."""
    if source.reference is None or source.example is None:
        raise SpecError("--reference: needs --example, a call of it such as 'x=randn(64,128) eps=1e-6'; or --spec")
    name = source.reference.rpartition(":")[2].rpartition(".")[2]
    found = resolve(source.reference, "--reference")
    if not callable(found):
        raise SpecError(f"--reference: got {source.reference}, which is no function; allowed: module:function")
    call = example.read(source.example)
    with Caught() as caught:
        function = calling.as_function(found, name)
        inspect.signature(function)
    if caught.error is not None:
        raise SpecError(
            f"--reference: got {source.reference}, whose parameters are unknown ({describe(caught.error)});"
            " allowed: a Python function"
        ) from caught.error
    return learn.Learner(function, call, source.in_place, source.rows, source.grads)


def _spec(found: Any, where: str) -> Spec:
    spec = found if isinstance(found, Spec) else getattr(found, "spec", None)
    if not isinstance(spec, Spec):
        raise SpecError(f"{where}: got spec = {spec!r}; allowed: a Spec")
    return spec


def resolve(name: str, flag: str) -> Any:
    """The module, or the object in it, that a name of the command line means: "module:object" or "file.py:object".

    Raises:
        SpecError: it cannot be imported.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
        if find_spec("triton"):
            describe_a_gpu()
    path, _, attribute = name.partition(":")
    with Caught(SystemExit) as caught:
        if path.endswith(".py"):
            module = _file(path)
            return getattr(module, attribute) if attribute else module
        return pkgutil.resolve_name(name)
    raise SpecError(
        f"{flag}: got {name!r}, which cannot be imported ({describe(caught.error)});"
        " allowed: module:object, file.py:object"
    ) from caught.error


@cache
def _file(path: str) -> Any:
    """The module that a file defines."""
    name = Path(path).stem
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None or not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(name, module)  # where dataclasses and Triton look
    found.loader.exec_module(module)
    return module


def _loaded(point: EntryPoint) -> Any:
    with Caught(SystemExit) as caught:
        return point.load()
    raise SpecError(f"entry point {point.name} of {point.group}: {describe(caught.error)}") from caught.error


def _points(group: str) -> list[EntryPoint]:
    without = os.environ.get(WITHOUT, "").split()
    return [point for point in entry_points(group=f"conformance.{group}") if point.name not in without]


def peers() -> Mapping[str, EntryPoint]:
    """The peers of installed packages, by name."""
    return {point.name: point for point in _points("peers")}


@cache
def install_properties() -> None:
    """Add the properties of installed packages to PROPERTIES.

    Raises:
        SpecError: one cannot be loaded, or has the name of another.
    """
    for point in _points("properties"):
        found = _loaded(point)
        prop = found if isinstance(found, Property) else getattr(found, "PROPERTY", None)
        if not isinstance(prop, Property) or prop.name in PROPERTIES:
            raise SpecError(f"entry point {point.name}: got {prop!r}; allowed: a Property with a name of its own")
        PROPERTIES[prop.name] = prop
