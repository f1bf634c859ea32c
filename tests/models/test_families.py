"""The table of model families against transformers: every class and attribute that a row names exists."""

from typing import Any

import pytest
import torch

from tests import tiny
from unsloth_fast.models.families import FAMILIES, family_of


def test_every_family_has_a_tiny_model() -> None:
    """Under its name in lower case."""
    assert list(tiny.FAMILIES) == [name.lower() for name in FAMILIES]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_of_a_family_is_in_its_model_with_every_attribute_of_its_row(name: str) -> None:
    """The class's name is derived from the family's: a class that transformers renames would not be placed."""
    model = tiny.model(name.lower(), **tiny.FAMILIES[name.lower()].limits)
    attentions = [module for module in model.modules() if family_of(module)]
    assert attentions and all(family_of(attention) is FAMILIES[name] for attention in attentions)
    for path in filter(None, (FAMILIES[name].window, FAMILIES[name].softcap)):
        assert any(value_of(attention, path) for attention in attentions), path


def value_of(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_no_other_module_has_a_family() -> None:
    model = tiny.model("gemma3")
    assert [family_of(module) for module in (model, model.model, model.model.norm, torch.nn.LayerNorm(4))] == [None] * 4
