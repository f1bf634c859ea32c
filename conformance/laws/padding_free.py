"""Documents packed into one row without padding give the loss and every gradient of the same documents alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import ModelLaw
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """Only where a trainer packs this model; the untouched model may let documents see each other."""
    trial.demand_packing()
    return trial.compare([trial.documents.packed()], own=[trial.documents.padded()])


LAW = ModelLaw(*of_file(check))
