"""Gradient checkpointing changes neither the loss nor a gradient, under dropout neither."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from conformance.laws._law import Law
from conformance.property import of_file
from conformance.tolerances.gates import Failure, Unchecked

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
    batches = padded if trial.obstacles else packed
    used = trial.compare(batches, own=padded, model=model)
    with suppress(Unchecked):  # experts, whose weights take no dropout
        _demand_same_dropout(trial, batches)
    return used


def _demand_same_dropout(trial: ModelTrial, batches: list[dict[str, Any]]) -> None:
    """Raise Failure if a layer that is computed again drops other elements of an adapter's input."""
    from conformance.models.adapting import with_adapter
    from conformance.models.building import DROPOUT
    from unsloth_fast import FastLanguageModel

    model, found = trial.placed(model=with_adapter(trial.untouched(), dropout=DROPOUT)), []
    for how in (False, "unsloth"):
        FastLanguageModel.for_training(model, how)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(trial.run(batches, model=model).results)
    for name, kept in found[0].items():
        if (found[1][name] - kept).norm() > torch.finfo(trial.dtype).eps ** 0.5 * kept.norm():
            raise Failure(f"{name} is another one with checkpointing, from the same random numbers of lora_dropout")


LAW = Law(*of_file(check))
