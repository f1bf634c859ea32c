"""Replaced methods of single instances: each inverse gives back exactly what the instance had before."""

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from unsloth_fast import backends
from unsloth_fast.models import checkpointing, head, place, remove
from unsloth_fast.models.methods import replace_method, replaced_method, restore_method

REFERENCE = backends.resolve("reference")
TOKENS = torch.arange(3, 23).reshape(2, 10)


class Greeter:
    """Something with a method."""

    def __init__(self, name: str) -> None:
        self.name = name

    def greet(self) -> str:
        return f"class: {self.name}"


def ours(self: Greeter) -> str:
    return f"ours: {self.name}"


def theirs(self: Greeter) -> str:
    return f"theirs: {self.name}"


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_restoring_gives_back_what_the_instance_had(patched: bool, copied: bool) -> None:
    """The instance had nothing, or a method that somebody else had set; a copy's method is bound to the copy."""
    greeter = Greeter("a")
    if patched:
        greeter.greet = MethodType(theirs, greeter)
    before = dict(vars(greeter))
    replace_method(greeter, "greet", ours, "loss")
    if copied:
        original, greeter = greeter, copy.deepcopy(greeter)
        greeter.name = "b"
        assert original.greet() == "ours: a"
    assert greeter.greet() == f"ours: {greeter.name}"
    assert restore_method(greeter, "greet", "loss")
    assert greeter.greet() == f"{'theirs' if patched else 'class'}: {greeter.name}"
    assert vars(greeter).keys() == before.keys()
    if not copied:
        assert vars(greeter) == before
    assert not restore_method(greeter, "greet", "loss")


def test_a_method_that_somebody_replaced_afterwards_stays() -> None:
    """Their method may call ours, so neither is removed; once theirs is gone, ours can be."""
    greeter = Greeter("a")
    replace_method(greeter, "greet", ours, "loss")
    mine = greeter.greet
    greeter.greet = MethodType(theirs, greeter)
    assert not restore_method(greeter, "greet", "loss")
    assert greeter.greet() == "theirs: a"
    greeter.greet = mine
    assert restore_method(greeter, "greet", "loss")
    assert vars(greeter) == {"name": "a"}


def test_a_purpose_replaces_and_restores_its_own_method_only() -> None:
    """A second replacement for the same purpose replaces the first; one for another purpose comes on top of it."""
    greeter = Greeter("a")
    replace_method(greeter, "greet", theirs, "loss")
    replace_method(greeter, "greet", ours, "loss")
    assert not restore_method(greeter, "greet", "head")
    with pytest.raises(KeyError), replaced_method(greeter, "greet", theirs, "head"):
        assert greeter.greet() == "theirs: a"
        assert not restore_method(greeter, "greet", "loss")
        raise KeyError
    assert greeter.greet() == "ours: a"
    assert restore_method(greeter, "greet", "loss")
    assert vars(greeter) == {"name": "a"}


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of every module; parameters and submodules are compared by identity."""
    return [
        {name: sorted(map(id, value.values())) if name in ("_parameters", "_modules") else value for name, value in own}
        for own in (vars(module).copy().items() for module in model.modules())
    ]


# Each change of a model, and its inverse.
PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "place": (partial(place, backend=REFERENCE), remove),
    "add_loss": (partial(head.add_loss, backend=REFERENCE), head.remove_loss),
    "enable_offloading": (checkpointing.enable_offloading, checkpointing.disable_offloading),
}


@pytest.mark.parametrize("order", list(itertools.permutations(PAIRS)), ids=" then ".join)
@pytest.mark.parametrize("removed", ["last first", "first first"])
@pytest.mark.parametrize("copied", [False, True])
def test_each_inverse_is_exact_in_any_order(order: tuple[str, ...], removed: str, copied: bool) -> None:
    """The modules' attributes, the state-dict names and the logits are those of the untouched model."""
    model = tiny.model("gemma3")
    expected, names = model(TOKENS).logits, list(model.state_dict())
    model.forward = MethodType(type(model).forward, model)  # somebody else's
    before = attributes(model)
    for name in order:
        PAIRS[name][0](model)
    assert list(model.state_dict()) == names
    if copied:
        model = copy.deepcopy(model)
    loss = model(input_ids=TOKENS, labels=TOKENS, backend_loss=True).loss
    assert loss.isfinite() and "_set_gradient_checkpointing" in vars(model)
    for name in order if removed == "first first" else reversed(order):
        PAIRS[name][1](model)
    assert attributes(model) == before or copied
    assert [list(own) for own in attributes(model)] == [list(own) for own in before]
    assert [name for module in model.modules() for name in vars(module) if "unsloth" in name] == []
    assert model.forward.__self__ is model and model.forward.__func__ is type(model).forward
    assert torch.equal(model(TOKENS).logits, expected) and list(model.state_dict()) == names


def test_the_hidden_adapter_of_a_head_is_shown_again() -> None:
    """It is shown also after an error, and no trace stays."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["lm_head"]))
    before = attributes(model)
    with pytest.raises(KeyError), head.head_without_adapter(model):
        assert type(model.get_output_embeddings()) is nn.Linear
        raise KeyError
    assert isinstance(model.get_output_embeddings(), BaseTunerLayer)
    assert attributes(model) == before


def test_a_model_with_replaced_methods_can_be_pickled() -> None:
    """`torch.save` of a whole model pickles it; the copy computes the same with the forwards of its classes."""
    model = tiny.model()
    place(model, REFERENCE)
    head.add_loss(model, REFERENCE)
    checkpointing.enable_offloading(model)
    checkpointing.enable_checkpointing(model, True)
    model.disable_input_require_grads()  # its hook is a local function of transformers
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    assert place(copied, REFERENCE) == place(model, REFERENCE)
    remove(copied)
    head.remove_loss(copied)
