"""A model that is saved and loaded by transformers has every tensor, with the same bits, tied as before."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conformance.laws._law import Law
from conformance.property import of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, bits, describe

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> None:
    """Without what the untouched model loses too."""

    def lost(model: Any) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, dtype=trial.dtype).to(trial.device)
        untied = set().union(*(_tied(model) ^ _tied(loaded)))
        return differing(model.state_dict(), loaded.state_dict()) + sorted(untied)

    demand_none_lost(lost, trial.placed(), trial.untouched)


def demand_none_lost(lost: Callable[[Any], list[str]], placed: Any, untouched: Callable[[], Any]) -> None:
    """Raise Failure for a model that loses tensors, other than those that the untouched model loses.

    Args:
        lost: saves and loads a model; returns the names of the tensors that are missing then, have other bits, or are
            tied otherwise.
        placed: the model.
        untouched: makes the untouched model.
    """
    from conformance.models.running import excuse

    names: list[str] = []
    with Caught() as caught:
        names = lost(placed)
    if caught.error is None and not names:
        return
    likewise: list[str] = []
    with excuse():
        likewise = lost(untouched())
    if caught.error is not None:
        raise Failure(f"raised {describe(caught.error)}") from caught.error
    if names := [name for name in names if name not in likewise]:
        what = "is missing after saving and loading, has other elements, or is no longer tied as before"
        raise Failure(f"{names[0]} {what}\n{len(names)} in all")


def _tied(model: Any) -> set[frozenset[str]]:
    """The names of parameters that are the same parameter."""
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    return {frozenset(names) for names in named.values() if len(names) > 1}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names of tensors that the second dictionary lacks, or has with other bits."""

    def same(one: Tensor, other: Tensor) -> bool:
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bool((bits(one) == bits(other)).all())

    return [name for name, tensor in first.items() if name not in second or not same(tensor, second[name])]


LAW = Law(*of_file(check))
