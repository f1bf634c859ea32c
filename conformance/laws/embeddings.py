"""A token embedding and a head that are trained beside adapters get the gradients that they have under peft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """Those in peft's `modules_to_save`."""
    return trial.compare_adapted(lambda name: "modules_to_save" in name)


LAW = Law(*of_file(check))
