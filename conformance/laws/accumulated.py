"""Gradients accumulated over microbatches, divided by all their targets, are those of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """One document in each microbatch, with different numbers of targets."""
    return trial.compare(trial.documents.alone(), targets=trial.documents.targets)


LAW = Law(*of_file(check))
