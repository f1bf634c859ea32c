"""What can be asked for, and which checks does a backend have? One for each operation or piece, property and dtype."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from conformance import backends, operations
from conformance.backends import Judged
from conformance.case import DTYPES
from conformance.declarations import SpecError
from conformance.operations import PROJECT, Source
from conformance.pieces import pieces
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.running.runner import OneByOne, Task
from conformance.running.search import Result
from conformance.trial import BackendError


class UsageError(Exception):
    """What was asked for cannot be run; the message states the value seen and the allowed values."""


def known(what: str, names: Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """The names, or all allowed names if none is given; raises UsageError for one that is not allowed."""
    for name in names or []:
        if name not in allowed:
            raise UsageError(f"{what}: got {name!r}; allowed: {', '.join(allowed)}")
    return list(dict.fromkeys(names or allowed))


def names_of(source: Source) -> tuple[list[str], list[str]]:
    """The names of the operations and of the training pieces that can be judged."""
    operations.install_properties()
    return list(operations.specs(source)), [] if source else list(backends.PIECES)


def all_properties() -> list[str]:
    """The names of all properties, of operations and of pieces, without repetitions."""
    return list(dict.fromkeys([*PROPERTIES, *(name for piece in pieces().values() for name in piece.properties)]))


def properties_of(op: str) -> Collection[str]:
    """The names of the properties of an operation or piece."""
    return pieces()[op].properties if op in backends.PIECES else PROPERTIES


def device_of(asked: str | None) -> str:
    """The requested device, by default cuda if there is a CUDA device; raises UsageError if it is missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: got cuda, but torch finds no CUDA device; allowed here: cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def judged_by(backend: str, device: str | None, source: Source) -> tuple[str, Judged]:
    """The requested device and backend."""
    device = device_of(device)
    return device, backends.load(backend, device, source)


def tasks_of(
    judged: Judged,
    device: str,
    profile: str,
    source: Source = PROJECT,
    ops: Sequence[str] = (),
    properties: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Task]:
    """The checks of a backend, operation by operation; an empty list of names stands for all of them."""
    return [
        Task(judged.name, op, name, dtype, device, profile, source=source)
        for op in ops or judged.functions
        if op in judged.functions
        for name in properties or all_properties()
        for dtype in ([None] if op in backends.PIECES else dtypes or DTYPES)
        if name in properties_of(op)
    ]


def ask(
    worker: OneByOne,
    backend: str,
    device: str | None,
    profile: str,
    source: Source = PROJECT,
    properties: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> tuple[Task, ...]:
    """The checks of a backend, which only the worker's process imports.

    Args:
        worker: keeps its process for later tasks.
        backend, device, profile, source, properties, dtypes: as on the command line; `device` None for cuda if there is
            a CUDA device, an empty list of names for all.

    Raises:
        UsageError: one of them is not usable.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the process takes it over: a backend may be in the current folder
    catalogue = _Catalogue(
        backend, "", "", None, device or "cpu", profile,
        source=source, properties=tuple(properties), dtypes=tuple(dtypes), asked=device,
    )  # fmt: skip
    found = worker(catalogue)
    if not isinstance(found, _Found):
        raise UsageError(found.message)
    operations.install_properties()  # here too, for the report
    return found.tasks


@dataclass(frozen=True)
class _Found(Result):
    """The result of a _Catalogue that passed, with the checks."""

    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True)
class _Catalogue(Task):
    """A task that lists the checks of a backend.

    Attributes:
        properties, dtypes: to check; all if empty.
        asked: the device that was asked for.
    """

    properties: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    asked: str | None = None

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        """The checks, or a failure whose message is that of a usage error."""
        try:
            return _Found("", "", None, "pass", tasks=tuple(self._tasks()))
        except (UsageError, BackendError, SpecError) as error:
            return Result("", "", None, "fail", message=str(error))

    def _tasks(self) -> list[Task]:
        names_of(self.source)  # adds the properties of installed packages
        properties = known("property", self.properties, all_properties())
        dtypes = known("dtype", self.dtypes, list(DTYPES))
        known("device", [self.asked] if self.asked else None, ["cpu", "cuda"])
        known("profile", [self.profile], list(PROFILES))
        device, judged = judged_by(self.backend, self.asked, self.source)
        tasks = tasks_of(judged, device, self.profile, self.source, (), properties, dtypes)
        if not tasks:
            raise UsageError(f"{', '.join(judged.functions)}: no property of {', '.join(properties)}: nothing to run")
        return tasks
