"""In evaluation mode, without gradients, hidden states, logits and the loss are those of the untouched model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """The documents alone, and packed where a trainer packs; a padded batch, with the loss of the model's forward."""
    import torch

    from conformance.models.running import GRADIENT

    model, documents = trial.placed().eval(), trial.documents
    with torch.no_grad():
        used = trial.compare(documents.alone(), model=model, labels=False)
        if not trial.obstacles:
            packed, padded = [documents.packed()], [documents.padded()]
            used = max(used, trial.compare(packed, own=padded, model=model, labels=False))
        whole = {"targets": documents.targets, "names": lambda name: not name.startswith(GRADIENT)}
        return max(used, trial.compare([documents.padded()], model=model, **whole))


LAW = Law(*of_file(check))
