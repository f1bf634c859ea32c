"""Adapters in other states and of other kinds are judged: each planted fault breaks the law that is about it."""

from typing import Any

import pytest
import torch

from conformance.laws import LAWS
from tests.judge.model_trials import after_placing, broken, llama
from unsloth_fast.models import interface, lora, nf4, packed

pytestmark = pytest.mark.usefixtures("quiet_models")


def only_adapter(monkeypatch: pytest.MonkeyPatch, **ignored: Any) -> None:
    """Let a placed layer find its adapter as if these attributes were others."""
    own = lora._only_adapter

    def found(layer: Any, dtype: torch.dtype) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ignored.items():
                if isinstance(getattr(type(layer), name, None), property):
                    patch.setattr(type(layer), name, value)
                else:
                    patch.setitem(vars(layer), name, value)
            return own(layer, dtype)

    monkeypatch.setattr(lora, "_only_adapter", found)


@pytest.mark.parametrize(
    ("law", "ignored"),
    [
        ("switched", {"disable_adapters": False}),
        ("switched", {"merged": False}),
        ("dora", {"lora_variant": {}}),
        ("dropout", {"training": False}),
    ],
    ids=["switched off", "merged", "DoRA", "dropout"],
)
def test_what_an_adapter_is_beside_lora_is_ignored(
    law: str, ignored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    LAWS[law].check(llama())
    only_adapter(monkeypatch, **ignored)
    allowed = (
        "in logits",
        "in the hidden states of base_model.model.model.layers.0",
        "lora_dropout does not act in a ",
    )
    assert any(place in broken(law, llama()) for place in allowed)


def test_a_dropout_of_the_attention_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents take another way than padded ones."""
    monkeypatch.setattr(interface, "_masked_attention", lambda attention, function: None)
    monkeypatch.setattr(packed, "_obstacle", lambda *args: None)
    assert "attention_dropout does not act in a packed batch as it should\nmeasured 0" in broken("dropout", llama())


def test_an_adapter_of_the_embedding_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                parameter.requires_grad_(False)

    assert LAWS["ends"].check(llama())
    after_placing(monkeypatch, freeze)
    assert "embed_tokens.lora_embedding_A.default is missing (None)" in broken("ends", llama())


def test_a_weight_in_4_bits_whose_second_scale_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LAWS["quantized"].check(llama())
    own: Any = nf4._weight
    monkeypatch.setattr(
        nf4, "_weight", lambda weight, state: (w := own(weight, state))._replace(nested_absmax=0 * w.nested_absmax)
    )
    monkeypatch.setattr(nf4, "_same_bits", lambda *args: True)
    assert "in the hidden states of base_model.model.model.layers.0" in broken("quantized", llama())


def test_a_frozen_weight_with_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    own = lora._linear_operands

    def thawed(layer: Any, dtype: torch.dtype) -> Any:
        layer.base_layer.weight.requires_grad_(True)
        return own(layer, dtype)

    monkeypatch.setattr(lora, "_linear_operands", thawed)
    assert ".base_layer.weight is not 0, and the parameter is not trained" in broken("adapters", llama())


def test_a_frozen_weight_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one unit in the last place, in one element, after the forward has used it."""
    own: Any = lora._linear_operands

    def updated(layer: Any, dtype: torch.dtype) -> Any:
        weight, *others = own(layer, dtype)
        used = weight.clone()
        layer.base_layer.weight.data[0, 0] *= 1 + 2.0**-22
        return used, *others

    monkeypatch.setattr(lora, "_linear_operands", updated)
    assert ".base_layer.weight has other bits after a step" in broken("adapters", llama())
