"""Generation as scripts for Unsloth call it: what a tokenizer returns is accepted whole, and texts are padded left."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

_SIDE = "unsloth_padding_side"  # the attribute of a model with its tokenizer's side before `pad_left`
_BALANCING = "output_router_logits"
TOKENIZER = "unsloth_tokenizer"
"""The attribute of a model with the tokenizer that was loaded with it."""


def generate(model: Any, inputs: Any = None, *positional: Any, **keywords: Any) -> Any:
    """The model's `generate`, which also accepts what a tokenizer returns as `inputs` or `input_ids`.

    `tokenizer.apply_chat_template(..., return_tensors="pt")` returns a dictionary of input_ids and attention_mask since
    transformers 5, and a tensor before. token_type_ids are left out if the model does not take them.

    Args:
        model: a `transformers.PreTrainedModel`.
        inputs: the prompts, [B, S], or a dictionary of the model's inputs.
        *positional: further arguments of `transformers.GenerationMixin.generate`.
        **keywords: further arguments of `transformers.GenerationMixin.generate`; they replace the dictionary's.
    """
    unpacked: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        unpacked, inputs = dict(inputs), None
    for name in ("input_ids", "inputs"):
        if isinstance(keywords.get(name), Mapping):
            unpacked |= keywords.pop(name)
    keywords = unpacked | keywords
    if "token_type_ids" in keywords and "token_type_ids" not in inspect.signature(type(model).forward).parameters:
        del keywords["token_type_ids"]
    with _without_balancing(model.config.get_text_config()):
        return type(model).generate(model, inputs, *positional, **keywords)


@contextmanager
def _without_balancing(config: Any) -> Iterator[None]:
    """Leave out the load-balancing loss of experts, which trl turns on: it fails on padded prompts with a cache."""
    before = getattr(config, _BALANCING, False)
    if before:
        setattr(config, _BALANCING, False)
    try:
        yield
    finally:
        if before:
            setattr(config, _BALANCING, before)


def pad_left(model: nn.Module) -> None:
    """Let the tokenizer that was loaded with the model pad on the left, as generation requires."""
    tokenizer = getattr(model, TOKENIZER, None)
    if tokenizer is not None and tokenizer.padding_side != "left":
        setattr(model, _SIDE, tokenizer.padding_side)
        tokenizer.padding_side = "left"


def restore_padding(model: nn.Module) -> None:
    """Undo `pad_left`."""
    side = vars(model).pop(_SIDE, None)
    if side is not None:
        getattr(model, TOKENIZER).padding_side = side
