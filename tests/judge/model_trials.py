"""Tiny models under the reference's operations, faults that are planted when they are placed, and broken laws."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.laws import LAWS
from conformance.models import trial as trials
from conformance.models.building import Subject
from conformance.models.trial import ModelTrial
from conformance.tolerances.gates import Failure
from unsloth_fast.backends import Backend

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


def after_placing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let every placement change the model too."""
    place = trials.place

    def planted(model: Any, backend: Backend) -> None:
        place(model, backend)
        change(model)

    monkeypatch.setattr(trials, "place", planted)


def with_operation(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any]) -> None:
    """Let every placement use another operation of this name, which gets the right one first."""
    place = trials.place

    def planted(model: Any, backend: Backend) -> None:
        kernels = vars(backend.kernels)
        changed = kernels | {name: lambda *args, **options: wrong(kernels[name], *args, **options)}
        place(model, replace(backend, kernels=SimpleNamespace(**changed)))

    monkeypatch.setattr(trials, "place", planted)
