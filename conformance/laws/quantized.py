"""LoRA over linear layers in 4 bits gets the gradients that it has over the weights that the 4 bits stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conformance.laws._law import Law
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> float:
    """NF4 with nested scales; the truth has these weights in full."""
    from conformance.models.quantizing import RoundedSubject, in_4_bits, layers_of

    plain = trial.untouched()
    layers = layers_of(plain, trial.adapter[1])
    subject = trial.subject
    full = replace(trial, subject=RoundedSubject(subject.name, subject.random, subject.fields, subject.dropout, layers))
    model = full.placed(adapted=True, model=in_4_bits(plain, layers))
    return full.compare([trial.documents.padded()], model=model, adapted=True)


LAW = Law(*of_file(check))
