"""Gradient checkpointing changes neither the loss nor a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.laws._law import ModelLaw
from conformance.property import of_file
from conformance.tolerances.gates import Unchecked

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """With `FastLanguageModel.for_training(model, "unsloth")`; packed where a trainer packs."""
    from unsloth_fast import FastLanguageModel

    model = trial.placed()
    if not model.supports_gradient_checkpointing:
        raise Unchecked("transformers has no gradient checkpointing for this model")
    FastLanguageModel.for_training(model, "unsloth")
    padded, packed = [trial.documents.padded()], [trial.documents.packed()]
    return trial.compare(padded if trial.obstacles else packed, own=padded, model=model)


LAW = ModelLaw(*of_file(check))
