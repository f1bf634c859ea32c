"""Documents packed into one row without padding give the loss and every gradient of the same documents alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """Only where a trainer packs this model; the untouched model may let documents see each other.

    The model first gets them in the opposite order: it may keep nothing of a row for the next one.
    """
    from conformance.models.running import turned_back

    trial.demand_packing()
    model, documents = trial.placed(), trial.documents
    first = trial.run([documents.turned().packed()], model=model, balanced=trial.balances)
    used = trial.compare([documents.packed()], own=[documents.padded()], model=model)
    turned = replace(first, results=turned_back(first.results, documents.lengths))
    return max(used, trial.judge(turned, trial.truth_of_batch))


LAW = Law(*of_file(check))
