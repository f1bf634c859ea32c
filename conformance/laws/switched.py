"""A model whose adapter is switched off computes what it did before it had one; one that is merged counts once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import ModelLaw
from conformance.property import of_file
from conformance.tolerances.gates import Unchecked
from conformance.trial import Caught, describe

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """As the model that a preference is measured against, and as a model that generates."""
    from conformance.models.running import LOGITS

    batches = [{"input_ids": batch["input_ids"]} for batch in trial.documents.alone()]
    model = trial.placed(adapted=True)
    with model.disable_adapter():
        used = trial.compare(batches, model=model, labels=False, names=lambda name: name == LOGITS)
    with Caught() as caught:
        trial.untouched(adapted=True, merged=True)
    if caught.error is not None:
        raise Unchecked(f"peft does not merge the adapter: {describe(caught.error)}")
    model.merge_adapter()
    judged = trial.run(batches, model=model, own_loss=False)
    return max(used, trial.judge(judged, trial.truth_of_merged, names=lambda name: name == LOGITS))


LAW = ModelLaw(*of_file(check))
