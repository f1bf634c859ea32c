"""What a property is: something that every correct implementation of an operation or training piece satisfies."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from conformance.profiles import Profile

# The trial is a Trial or a PieceTrial, the case a Case or a PieceCase, the declaration a Spec or a Piece.
Check = Callable[[Any, Any], float | None]
Cases = Callable[[Any, Profile], Sequence[Any]]
Exempt = Callable[[Any], str]
Stated = TypeVar("Stated", bound=Callable[..., float | None])
Need = Literal["cuda", "two devices", "fpsan", "gigabytes", "gradients", "rows", "a copy"]


@dataclass(frozen=True)
class Property:
    """One property.

    Attributes:
        name: on the command line.
        statement: what holds, in one sentence.
        check: called with a trial and a case; raises Failure if the property does not hold, and Unchecked if it says
            nothing about the case. Returns the fraction of the error budget that was used, or None if the property has
            no budget.
        cases: returns a fixed list of cases for a declaration and a profile; None to draw cases.
        share: fraction of the profile's examples to draw.
        needs: "cuda" skips the property on a CPU, "two devices" with fewer GPUs, "fpsan" without a Triton that has that
            sanitizer; "gigabytes" keeps the runner from running two such tasks at once; "gradients" and "rows" skip it
            for operations that have none, "a copy" for those that work in place.
        exempt: returns why a declaration promises nothing about the property; empty if it does.
        each_option: whether the property tries what a backend may lack one by one, so that it fails for a call that
            raises NotImplementedError. Under any other property a case with an option that is lacking is not checked.
        costly: whether it also checks the costly cases of a spec.
    """

    name: str
    statement: str
    check: Check
    cases: Cases | None = None
    share: float = 1.0
    needs: Sequence[Need] = ()
    exempt: Exempt = lambda declaration: ""
    each_option: bool = False
    costly: bool = False

    def lacks(self, device: str) -> str | None:
        """Why the property cannot be checked on a device ("cpu" or "cuda"); None if it can."""
        if "cuda" in self.needs and device != "cuda":
            return "needs CUDA"
        if "two devices" in self.needs and (device != "cuda" or torch.cuda.device_count() < 2):
            return "needs two CUDA devices"
        if "fpsan" in self.needs and not _has_fpsan():
            return "needs Triton's floating-point sanitizer, which 3.9 is the first to have"
        return None

    def skipped(self, trial: Any) -> str | None:
        """Why the property is not checked for a trial, on its device and of its declaration; None if it is."""
        if why := self.lacks(trial.device):
            return why
        if "gradients" in self.needs and not trial.spec.grads:
            return "the operation has no gradients"
        if "rows" in self.needs and not trial.spec.rowwise:
            return "no input is declared to have independent rows"
        if "a copy" in self.needs and trial.spec.in_place:
            return "the operation works in place"
        return self.exempt(trial.spec) or getattr(trial.spec, "lacks", {}).get(self.name)


def of_file(check: Stated) -> tuple[str, str, Stated]:
    """Name, statement and check of what a file states: named as the file, with the first line of its docstring."""
    return check.__module__.rsplit(".", 1)[-1], _first_line(sys.modules[check.__module__].__doc__), check


def of_function(check: Stated) -> tuple[str, str, Stated]:
    """Name, statement and check of what a function states: named as it is, with the first line of its docstring."""
    return check.__name__, _first_line(check.__doc__), check


def _has_fpsan() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    knobs: Any = importlib.import_module("triton.knobs")
    return hasattr(knobs.compilation, "fpsan_homomorphic_casts")


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
