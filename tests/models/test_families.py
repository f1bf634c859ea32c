"""The table of model families against transformers: every class and attribute that a row names exists."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import tiny
from unsloth_fast.models import families

NAMES = list(families.FAMILIES)


def test_every_family_has_a_tiny_model() -> None:
    """Under its name in lower case."""
    assert list(tiny.FAMILIES) == [name.lower() for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_a_row_is_in_its_model(name: str) -> None:
    """The classes' names are derived from the family's: a class that transformers renames would not be placed."""
    found = {type(module).__name__ for module in tiny.model(name.lower()).modules()}
    assert set(families.FAMILIES[name].classes(name)) <= found


@pytest.mark.parametrize("name", NAMES)
def test_every_attribute_of_a_row_exists(name: str) -> None:
    """On the attention."""
    family, model = families.FAMILIES[name], tiny.model(name.lower(), **tiny.FAMILIES[name.lower()].limits)
    attentions = [module for module in model.modules() if families.family_of(module, "attention")]
    for path in filter(None, (family.window, family.softcap)):
        assert any(value_of(attention, path) for attention in attentions), path


def value_of(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_a_module_is_found_by_its_class() -> None:
    """The family and the part; neither for a class of no family."""
    model = tiny.model("gemma3")
    gemma3 = families.FAMILIES["Gemma3"]
    assert families.family_and_part(model.model) == (gemma3, "stack")
    attention = model.model.layers[0].self_attn
    assert families.family_of(attention, "attention") is gemma3
    assert families.family_of(attention, "stack") is None
    assert families.family_and_part(torch.nn.LayerNorm(4)) == (None, None)


def test_the_stack_of_a_family_may_have_a_name_of_its_own() -> None:
    """The other name is regular."""
    family = families.Family()
    assert family.classes("New") == {"NewAttention": "attention", "NewModel": "stack"}
    assert "NewTextModel" in replace(family, stack="NewTextModel").classes("New")
