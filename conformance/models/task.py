"""One law on one model, as conformance.running.runner runs it. Imports no transformers until it runs."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from conformance import backends
from conformance.case import DTYPES
from conformance.laws import LAWS
from conformance.running.search import Result
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Caught, describe

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


@dataclass(frozen=True)
class ModelTask:
    """Check one law on one model; the names are those of conformance.running.runner's tasks.

    Attributes:
        op: the model: its path or name, or with `random` an architecture.
        random: whether it is a tiny random model.
        property: the law.
        dtype: of the weights, by name.
        backend: as `unsloth_fast.backends.resolve` takes it.
        device: "cpu" or "cuda".
        data: a file of documents.
        documents: how many of them; None for the usual number.
    """

    op: str
    random: bool
    property: str
    dtype: str
    backend: str
    device: str
    data: Path | None = None
    documents: int | None = None

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        """Run in this process."""
        who = (self.op, self.property, self.dtype)
        with quiet(), Caught() as caught:
            try:
                trial = trial_of(self)
                used = LAWS[self.property].check(trial)
            except Unchecked as why:
                return Result(*who, "skip", message=str(why))
            except Failure as failure:
                return Result(*who, "fail", failure.used, 1, message=f"{failure}\n{self.again()}")
            return Result(*who, "pass", used, 1)
        return Result(*who, "fail", examples=1, message=f"raised {describe(caught.error)}\n{self.again()}")

    def again(self) -> str:
        """The line that reproduces the result."""
        return f"reproduce: python -m conformance model {shlex.join(self.words())}"

    def words(self) -> list[str]:
        """The arguments of a command line for this model, law, dtype, backend, device and documents."""
        words = ["--config", self.op] if self.random else [self.op]
        words += ["--law", self.property, "--dtype", self.dtype, "--backend", self.backend, "--device", self.device]
        words += ["--data", str(self.data)] if self.data else []
        return words + (["--documents", str(self.documents)] if self.documents else [])


def trial_of(task: ModelTask) -> ModelTrial:
    """The trial of a task; the last one is kept."""
    return _trial(task.op, task.random, task.dtype, task.backend, task.device, task.data, task.documents)


@lru_cache(maxsize=1)
def _trial(
    name: str, random: bool, dtype: str, backend: str, device: str, data: Path | None, documents: int | None
) -> ModelTrial:
    """The trial that the laws of one model share, with its truth."""
    backends.load("fast" if "fast" in backend else "reference", device)  # before anything imports triton
    building, trials = import_module("conformance.models.building"), import_module("conformance.models.trial")
    return trials.ModelTrial(building.Subject(name, random), backend, DTYPES[dtype], device, data, count=documents)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, and what libraries say or print of tiny models; a failure says what is wrong."""
    import_module("transformers.utils.logging").disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("transformers", "unsloth_fast", "peft", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def tasks_of(
    models: Sequence[str],
    random: bool,
    laws: Sequence[str],
    dtypes: Sequence[str],
    backend: str,
    device: str,
    data: Path | None,
    documents: int | None = None,
) -> list[ModelTask]:
    """Every law on every model in every dtype; those that share a truth follow each other."""
    return [
        ModelTask(model, random, law, dtype, backend, device, data, documents)
        for model in models
        for dtype in dtypes
        for law in laws
    ]
