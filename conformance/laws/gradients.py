"""The loss and every gradient of a padded batch are those of its documents alone in the untouched model.

Experts have a load-balancing loss too, which is that of the documents together. All laws of a single batch compare it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """The loss of the model's forward, which makes no whole logits."""
    return trial.compare([trial.documents.padded()])


LAW = Law(*of_file(check))
