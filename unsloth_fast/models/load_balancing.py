"""The load-balancing loss of a mixture of experts, by transformers' own function."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from unsloth_fast.models.protocols import CausalLM


def has_usual_load_balancing(model: CausalLM) -> bool:
    """Whether `load_balancing_loss` is the load-balancing loss of a model."""
    function, usual = (inspect.signature(each) for each in (_function_of(model), load_balancing_loss_func))
    return list(function.parameters) == list(usual.parameters)


def load_balancing_loss(model: CausalLM, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss by the function of the model's class; Mixtral's where it has none, as in TRL.

    Args:
        model: the language model itself, inside any adapter.
        router_logits: of each layer with experts, [tokens, experts].
        attention_mask: [B, S], 0 for padding; None if all tokens count.

    Returns:
        0-dim.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.
    """
    function, text = _function_of(model), model.config.get_text_config()
    experts, chosen = (
        getattr(model, name) if hasattr(model, name) else getattr(text, name)
        for name in ("num_experts", "num_experts_per_tok")
    )
    if attention_mask is None and "bincount" in function.__code__.co_names:  # it waits for the device, in each layer
        attention_mask = router_logits[0].new_ones(len(router_logits[0]))
    return function(router_logits, experts, chosen, attention_mask)


def _function_of(model: CausalLM) -> Callable[..., Any]:
    return inspect.unwrap(type(model).forward).__globals__.get("load_balancing_loss_func", load_balancing_loss_func)
