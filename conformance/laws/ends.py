"""LoRA on the token embedding and on the head gets the gradients that it has under peft's own layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """Beside LoRA on every linear layer; the loss is then computed from a head with an adapter."""
    return replace(trial, adapters="ends").compare_adapted(lambda name: True)


LAW = Law(*of_file(check))
