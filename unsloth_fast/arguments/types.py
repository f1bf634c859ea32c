"""Which types do the trainer's arguments have? Python, transformers and TRL would fail later, without the name."""

from collections.abc import Sized
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from unsloth_fast.data.types import Keywords
from unsloth_fast.models.head import without_adapter

_FUNCTIONS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "formatting_func")
_PAIRS = {
    "optimizers": "(an optimizer or None, a scheduler or None)",
    "optimizer_cls_and_kwargs": "(a class of optimizers, a dictionary of its options)",
}


def check_model(model: Any) -> None:
    """Refuse what is no language model, nor the name or path of one.

    Raises:
        TypeError: its type, and what is allowed.
    """
    known = isinstance(model, str) or (isinstance(model, nn.Module) and hasattr(without_adapter(model), "config"))
    _check("model", model, known, "a language model of transformers, or its name or path as a string")
    inner = model if isinstance(model, str) else without_adapter(model)
    headless = isinstance(inner, PreTrainedModel) and not inner.can_generate() and inner.get_output_embeddings() is None
    _check("model", inner, not headless, "one with an output head, as AutoModelForCausalLM loads it")


def check_types(model: Any, given: Keywords) -> None:
    """Refuse arguments of a type that no run can use.

    Args:
        model: the model, or the name or path of one, as `check_model` allows it.
        given: the trainer's other keywords, in the installed release's names; those without a row here are checked
            where they are read.

    Raises:
        TypeError: which argument, its type, and what is allowed.
        ValueError: no processing class for a model without a name.
    """
    _check_processing_class(given.get("processing_class"), model)
    for name in _FUNCTIONS:
        value: Any = given.get(name)
        _check(name, value, value is None or callable(value), "a function, or None")
    for name, allowed in _PAIRS.items():
        value = given.get(name)
        pair = isinstance(value, Sized) and not isinstance(value, str) and len(value) == 2
        _check(name, value, value is None or pair, f"the pair {allowed}")
    callbacks: Any = given.get("callbacks")
    _check("callbacks", callbacks, callbacks is None or isinstance(callbacks, list), "a list of TrainerCallback")
    for index, callback in enumerate(callbacks or ()):
        kind = callback if isinstance(callback, type) else type(callback)
        fits = issubclass(kind, TrainerCallback)
        _check(f"callbacks[{index}]", callback, fits, "a transformers.TrainerCallback, or a class of them")


def _check_processing_class(processing_class: Any, model: Any) -> None:
    fits = processing_class is None or isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin)
    _check("processing_class", processing_class, fits, "a tokenizer or a processor of transformers, or None")
    if processing_class is None and not isinstance(model, str) and not without_adapter(model).config._name_or_path:
        raise ValueError(
            "processing_class: got None, and the model has no name to load one from; allowed: the model's tokenizer"
        )


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: {allowed}")
