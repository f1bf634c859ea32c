"""Each layer's hidden states and the logits are those of the untouched model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """Run each document alone, with logits; the first layer that differs is reported."""
    return trial.compare(trial.documents.alone(), labels=False)


LAW = Law(*of_file(check))
