"""The table of model families against transformers: every class and attribute that a row names exists."""

from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from unsloth_fast.models import families

PLACED = [name for name, family in families.FAMILIES.items() if family.norm]


def test_every_family_has_a_tiny_model() -> None:
    """Under its name in lower case; families of which only the head is known need none."""
    assert list(tiny.FAMILIES) == [name.lower() for name in PLACED]


@pytest.mark.parametrize("name", PLACED)
def test_every_class_of_a_row_is_in_its_model(name: str) -> None:
    """The classes' names are derived from the family's: a class that transformers renames would not be placed."""
    found = {type(module).__name__ for module in tiny.model(name.lower()).modules()}
    assert set(families.FAMILIES[name].classes(name)) <= found


@pytest.mark.parametrize("name", PLACED)
def test_every_attribute_of_a_row_exists(name: str) -> None:
    """On the norm, on the attention and on the config."""
    family, model = families.FAMILIES[name], tiny.model(name.lower(), **tiny.FAMILIES[name.lower()].limits)
    parts = [(module, families.family_and_part(module)[1]) for module in model.modules()]
    norms, attentions = ([module for module, part in parts if part == kind] for kind in ("norm", "attention"))
    assert family.norm is not None and all(isinstance(getattr(norm, family.norm.eps), float) for norm in norms)
    for path in filter(None, (family.window, family.softcap)):
        assert any(value_of(attention, path) for attention in attentions), path
    for field in filter(None, (family.logit_scale, family.logit_softcap)):
        assert hasattr(model.config, field)


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in PLACED])
def test_every_head_of_a_row_exists(name: str) -> None:
    """With the fields of its config."""
    (class_name,) = families.FAMILIES[name].classes(name)
    model_class = getattr(transformers, class_name)
    for field in filter(None, (families.FAMILIES[name].logit_scale, families.FAMILIES[name].logit_softcap)):
        assert hasattr(model_class.config_class(), field)


def value_of(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_a_module_is_found_by_its_class() -> None:
    """The family and the part; neither for a class of no family."""
    model = tiny.model("gemma3")
    gemma3 = families.FAMILIES["Gemma3"]
    assert families.family_and_part(model) == (gemma3, "causal_lm")
    assert families.family_and_part(model.model) == (None, None)
    assert families.family_of(model.model.norm, "norm") is gemma3
    assert families.family_of(model.model.norm, "mlp") is None
    assert families.family_and_part(torch.nn.LayerNorm(4)) == (None, None)


def test_names_are_regular() -> None:
    assert families.Family(families.LLAMA_NORM).classes("New") == {
        "NewRMSNorm": "norm",
        "NewMLP": "mlp",
        "NewAttention": "attention",
        "NewForCausalLM": "causal_lm",
    }
