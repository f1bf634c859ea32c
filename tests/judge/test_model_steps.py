"""Faults that one forward in training does not show: of evaluation, of a second row, of inputs, of random numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.laws import LAWS
from conformance.models import trial as trials
from tests.judge.model_trials import after_placing, broken, llama, with_operation
from unsloth_fast.backends import Backend
from unsloth_fast.models import checkpointing, lora, packed

pytestmark = pytest.mark.usefixtures("quiet_models")


def with_attention(monkeypatch: pytest.MonkeyPatch, bounds_of: Callable[[Tensor], Tensor]) -> None:
    """Let `packed_attention` get other bounds of documents."""

    def wrong(right: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any, **options: Any) -> Tensor:
        return right(q, k, v, bounds_of(bounds), *rest, **options)

    with_operation(monkeypatch, "packed_attention", wrong)


def test_documents_that_see_each_other_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    with_attention(monkeypatch, lambda bounds: bounds if torch.is_grad_enabled() else bounds[[0, -1]])
    assert LAWS["padding_free"].check(llama())
    assert "the hidden states of model.layers.0" in broken("evaluated", llama())


def test_bounds_of_an_earlier_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows with as many tokens, whichever model they were of."""
    known: dict[int, Tensor] = {}
    with_attention(monkeypatch, lambda bounds: known.setdefault(int(bounds[-1]), bounds))
    assert LAWS["evaluated"].check(llama())
    assert "the hidden states of model.layers.0" in broken("padding_free", llama())


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
def test_an_input_that_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other laws are judged on the right one."""
    add = trials.add_loss

    def planted(model: Any, backend: Backend) -> None:
        add(model, backend)
        forward = model.forward

        def changing(*args: Any, **inputs: Any) -> Any:
            outputs = forward(*args, **inputs)
            if name in inputs:
                inputs[name].fill_(1)
            return outputs

        model.forward = changing

    monkeypatch.setattr(trials, "add_loss", planted)
    assert broken("gradients", llama()).startswith(f"{name} has other bits after a step")
    monkeypatch.undo()
    assert LAWS["accumulated"].check(llama())


def test_a_checkpoint_that_forgets_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(_: object, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    monkeypatch.setattr(checkpointing, "_with_inputs_on_host", forgetful)
    assert "is another one with checkpointing, from the same random numbers" in broken("checkpointed", llama())


def test_half_the_rate_of_dropout_in_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    own, name = packed._attention, "masked_sdpa"

    def halved(*args: Any, dropout: float = 0.0, **options: Any) -> Any:
        rate = dropout if args[2].shape[0] > 1 else dropout / 2
        return own(*args, before="sdpa", dropout=rate, **options)

    monkeypatch.setitem(packed.ALL_ATTENTION_FUNCTIONS._global_mapping, name, halved)
    assert broken("dropout", llama()).startswith("attention_dropout does not act in a packed batch")


def test_an_adapter_that_is_not_the_active_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = lora._only_adapter

    def first(layer: Any, dtype: torch.dtype) -> Any:
        found = own(layer, dtype)
        return found and (layer.lora_A["default"].weight, layer.lora_B["default"].weight, found[2])

    monkeypatch.setattr(lora, "_only_adapter", first)
    assert "in logits" in broken("switched", llama())


def test_a_generation_that_differs_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        norm, modes = model.model.norm, set[bool]()
        forward = norm.forward

        def later(states: Tensor) -> Tensor:
            modes.add(norm.training)
            return forward(states) * (1 if len(modes) == 1 else -1)

        norm.forward = later

    after_placing(monkeypatch, change)
    assert "should be" in broken("generated", llama())


def test_a_scale_of_an_adapter_without_the_root_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = lora._only_adapter

    def divided(layer: Any, dtype: torch.dtype) -> Any:
        found = own(layer, dtype)
        return found and (*found[:2], layer.lora_alpha["default"] / layer.r["default"])

    monkeypatch.setattr(lora, "_only_adapter", divided)
    assert LAWS["adapters"].check(llama())
    assert "the hidden states of base_model.model.model.layers.0" in broken("ends", llama())
