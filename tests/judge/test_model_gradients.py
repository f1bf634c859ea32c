"""Gradients of whole models are judged down to the embedding: below every attention, and where weights are tied."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from conformance.models.running import GRADIENT
from conformance.models.trial import ModelTrial
from conformance.tolerances.bounds import Arithmetic
from tests.judge.model_trials import after_placing, broken, trial_of

pytestmark = pytest.mark.usefixtures("quiet_models")


def two_layers(tied: bool = False) -> ModelTrial:
    """A Llama of two layers, with torch's attention in the truth."""
    return trial_of("llama", tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [False, True])
def test_no_gradient_has_a_budget_as_wide_as_itself(tied: bool) -> None:
    """Roundings change the digits of float32 alone."""
    how = Arithmetic(torch.finfo(torch.float32).eps / 2, 1, 2**10)
    gradients = {name: r for name, r in two_layers(tied).truth.responses.items() if name.startswith(GRADIENT)}
    wide = {name: float(r.largest(how).norm() / r.truth.norm()) for name, r in gradients.items()}
    assert len(wide) == 20 + (not tied) and 0 < max(wide.values()) < 1e-4


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_gradient_of_the_lowest_layer_that_is_a_little_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after_placing(monkeypatch, lambda model: model.get_parameter(name).register_hook(lambda gradient: 1.001 * gradient))
    assert f"in the gradient of {name}" in broken("gradients", two_layers())


def test_a_head_that_is_no_longer_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding has a part of its gradient alone."""

    def untie(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    after_placing(monkeypatch, untie)
    assert "in the gradient of model.embed_tokens.weight" in broken("gradients", two_layers(tied=True))


def test_a_save_that_unties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor comes back with the same bits, as two parameters instead of one."""

    def untie_saved(model: Any) -> None:
        save = model.save_pretrained

        def saving(folder: str) -> None:
            model.config.tie_word_embeddings = False
            save(folder, state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()})

        model.save_pretrained = saving

    after_placing(monkeypatch, untie_saved)
    message = broken("saved", two_layers(tied=True))
    assert re.match(r"lm_head\.weight is missing .* or is no longer tied as before", message)
