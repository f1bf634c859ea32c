"""With the reference's operations in place of the backend's, the loss and every gradient are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file
from conformance.tolerances.gates import Unchecked

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """The same batch as in the law of gradients."""
    if trial.backend == "reference":
        raise Unchecked("the backend is the reference")
    return trial.compare([trial.documents.padded()], model=trial.placed(backend="reference"))


LAW = Law(*of_file(check))
