"""Tiny models under the reference's operations, which tests of the model judge share, and how a law is broken."""

from typing import Any

import pytest
import torch

from conformance.laws import LAWS
from conformance.models.building import Subject
from conformance.models.trial import ModelTrial
from conformance.tolerances.gates import Failure

_TRIALS: dict[str, ModelTrial] = {}


def trial_of(name: str, **fields: Any) -> ModelTrial:
    """A tiny model with these fields of its configuration; the same trial, with its truths, for the same call."""
    key = f"{name} {fields}"
    if key not in _TRIALS:
        _TRIALS[key] = ModelTrial(Subject.named(name, **fields), "reference", torch.float32, "cpu")
    return _TRIALS[key]


def llama() -> ModelTrial:
    """A Llama of one layer."""
    return trial_of("llama", num_hidden_layers=1)


def broken(law: str, trial: ModelTrial) -> str:
    """How a law is broken."""
    with pytest.raises(Failure) as failed:
        LAWS[law].check(trial)
    return str(failed.value)
