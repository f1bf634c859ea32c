"""Saving as scripts for Unsloth call it: merged models, adapters, GGUF files, on disk or on the hub.

`add_methods` gives a model the functions of this package as methods. A deep copy's methods are bound to the copy.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from unsloth_fast.models.fields import loaded_fields, remember_fields, with_values
from unsloth_fast.models.generation import generate
from unsloth_fast.models.head import without_adapter
from unsloth_fast.save.gguf import push_to_hub_gguf, save_pretrained_gguf
from unsloth_fast.save.llama_cpp import ALLOWED_QUANTS
from unsloth_fast.save.merged import Model, push_to_hub_merged, save_pretrained_merged

__all__ = [
    "ALLOWED_QUANTS",
    "add_methods",
    "patch_saving_functions",
    "push_to_hub_gguf",
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "save_pretrained_merged",
    "unsloth_generic_save_pretrained_merged",
    "unsloth_push_to_hub_gguf",
    "unsloth_push_to_hub_merged",
    "unsloth_save_model",
    "unsloth_save_pretrained_gguf",
    "unsloth_save_pretrained_merged",
]

Module = TypeVar("Module", bound=nn.Module)


def add_methods(model: nn.Module, further: Mapping[str, Callable[..., object]] | None = None) -> None:
    """Give a model the methods of this package, and the plain model inside it those that keep what was loaded.

    The inner model's `save_pretrained` writes what trainers change in the configuration, such as `use_cache`, as it was
    when this function was first called. Its `generate` accepts what a tokenizer returns.

    Args:
        model: the model, with or without adapters; changed in place.
        further: further functions to become methods, by their names.
    """
    base = without_adapter(model)
    remember_fields(base)
    _bind(base, {"save_pretrained": _save_as_loaded, "generate": generate})
    for owner in {id(base): base, id(model): model}.values():
        _bind(owner, _METHODS | dict(further or {}))


def patch_saving_functions(model: Module) -> Module:
    """Give any model the methods of this package; return it."""
    add_methods(model)
    return model


def unsloth_save_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    save_directory: str | Path,
    save_method: str = "lora",
    **kwargs: Any,
) -> None:
    """`save_pretrained_merged` with the arguments in another order and another default."""
    save_pretrained_merged(model, save_directory, tokenizer, save_method, **kwargs)


# The names of Unsloth's own functions, which some scripts import.
unsloth_generic_save_pretrained_merged = save_pretrained_merged
unsloth_save_pretrained_merged = save_pretrained_merged
unsloth_push_to_hub_merged = push_to_hub_merged
unsloth_save_pretrained_gguf = save_pretrained_gguf
unsloth_push_to_hub_gguf = push_to_hub_gguf

_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained_merged": save_pretrained_merged,
    "push_to_hub_merged": push_to_hub_merged,
    "save_pretrained_gguf": save_pretrained_gguf,
    "push_to_hub_gguf": push_to_hub_gguf,
}


def _bind(owner: object, functions: dict[str, Callable[..., Any]]) -> None:
    # A partial, unlike a bound method, can be pickled under a name that the class does not have.
    for name, function in functions.items():
        method = functools.partial(function, owner)
        method.__doc__ = function.__doc__
        vars(owner)[name] = method


def _save_as_loaded(model: Any, *positional: Any, **keywords: Any) -> Any:
    """`PreTrainedModel.save_pretrained`, with the values of the configuration that was loaded."""
    with with_values(model.config, loaded_fields(model)):
        return type(model).save_pretrained(model, *positional, **keywords)
