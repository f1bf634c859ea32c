"""A model whose adapter is switched off is what it was; another that is active counts alone, a merged one once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from conformance.laws._law import Law
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
        exchanged = _exchanged(trial.placed(adapted=True))
    if caught.error is None:  # peft takes one adapter of the weights of experts
        options: dict[str, Any] = {"labels": False, "names": lambda name: name == LOGITS, "adapted": True}
        used = max(used, trial.compare(batches, model=exchanged, **options))
    with Caught() as caught:
        trial.untouched(adapted=True, merged=True)
    if caught.error is not None:
        raise Unchecked(f"peft does not merge the adapter: {describe(caught.error)}")
    model.merge_adapter()
    judged = trial.run(batches, model=model, own_loss=False)
    return max(used, trial.judge(judged, trial.truth_of_merged, names=lambda name: name == LOGITS))


def _exchanged(model: Any) -> Any:
    """The model with a second adapter, which is active and has the weights that the first one had."""
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    named = dict(model.named_parameters())
    for name, first in named.items():
        if ".default" in name:
            named[name.replace(".default", ".second")].data.copy_(first)
            first.data.zero_()
    return model


LAW = Law(*of_file(check))
