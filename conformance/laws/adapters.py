"""Every LoRA adapter, of linear layers and of experts, gets the gradient that it has under peft's own layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """A and B, with a B that is not 0; and the loss and the hidden states with them."""
    return trial.compare_adapted(lambda name: "modules_to_save" not in name)


LAW = Law(*of_file(check))
