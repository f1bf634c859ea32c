"""The loss and every gradient of a batch that is padded on the left are those of its documents alone.

Positions count from the first token of a document, as in generation, where the model takes positions.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """The rows have different positions, and what carries a state from token to token meets padding first."""
    batch = trial.documents.padded(left=True)
    model = trial.placed()
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return trial.compare([batch], model=model)


LAW = Law(*of_file(check))
