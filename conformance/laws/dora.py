"""DoRA on every linear layer gets the gradients that it has under peft's own layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """A and B, and the magnitudes, which are not the norms of the weights."""
    return replace(trial, adapters="dora").compare_adapted(lambda name: True)


LAW = Law(*of_file(check))
