"""Are a model's logits the product of its head with the last hidden states? Checked once, by running a few tokens.

If so, the loss needs no whole logits, whatever the family. A config names its factor and its cap in several ways, so
each combination is a candidate, and exactly one must agree.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_fast.failures import FAILURES, in_words
from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.protocols import CausalLM

logger = logging.getLogger(__name__)

# What transformers' configs call the factor on the logits, or its reciprocal, and the cap on them, applied afterwards.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_SIZES = (1.0, 30.0, 1000.0)  # root mean squares of rows of products: below, near and above any cap that models have
_TOKENS = 2 * len(_SIZES)
_ROUNDINGS = 4  # of the product, the factor, the quotient in the cap and the cap itself
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "unsloth_fast")


@torch.compiler.disable()
def logit_options(model: CausalLM, own: Callable[..., object], inputs: Mapping[str, object]) -> dict[str, float] | None:
    """The options of `linear_cross_entropy` with which the model's logits are its head's; None where they are not.

    The model runs twice on a few tokens, without gradients, in its own dtype, on its device and in its own wrappers;
    everything below its head in evaluation mode. The first time the head gets random hidden states, large enough to
    reach a cap, in place of the last ones. The second time the model without its head is called as a step would call
    it, and must return the hidden states of the first time. The state of the model and of the random numbers is
    restored. Where it returns None, one sentence is logged.

    Args:
        model: the language model, inside any adapter.
        own: its forward, which returns the logits.
        inputs: of the step, with its labels.
    """
    try:
        found = _agreeing(model, own, inputs)
    except FAILURES as failure:
        found = f"the check on a few tokens failed: {in_words(failure)}"
    if isinstance(found, str):
        logger.warning("loss: all logits of a %s are computed: %s", type(model).__name__, found)
        return None
    return found


def _agreeing(model: Any, own: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, float] | str:
    base, head = without_head(model), model.get_output_embeddings()
    last: list[Tensor] = []
    products: list[Tensor] = []

    def replace_last(module: nn.Module, args: object, outputs: Any) -> object:
        last.append(outputs.last_hidden_state)
        # In the dtype of the product: the loss takes a head that is stored in another one than the layers.
        outputs.last_hidden_state = _hidden(head, last[-1].to(product_dtype(last[-1], head.weight)))
        products.append(head(outputs.last_hidden_state))
        return outputs

    few, beside = _few_tokens(model, inputs), _trained_beside(model, base, head)
    with undisturbed(model, base, few["input_ids"].device):
        hook = base.register_forward_hook(replace_last)
        try:
            with torch.set_grad_enabled(bool(beside)):
                logits = own(**few).logits
        finally:
            hook.remove()
    if beside and logits.requires_grad:  # a factor of 1 or a bias of 0 that is trained changes no number yet
        found = torch.autograd.grad(logits.sum(), [*beside.values()], allow_unused=True)
        if read := [name for name, each in zip(beside, found, strict=True) if each is not None]:
            return f"they depend on weights beside those of its head: {', '.join(read)}"
    with undisturbed(model, base, few["input_ids"].device):
        alone = base(**few).last_hidden_state
    if len(last) != 1:
        return f"it calls its base model {len(last)} times"
    largest = max(_unit(tensor) for tensor in (logits, products[0], last[0]))
    # Sums may be taken in another order, in every layer; another input would change the first digits.
    if not _norm(alone - last[0]) <= largest**0.5 * _norm(last[0]):
        return "it does not give its base model the inputs unchanged"
    candidates = list(_candidates(model.config))
    agreeing = [options for options in candidates if _agree(logits, products[0], largest, **options)]
    if len(agreeing) != 1:
        return f"{len(agreeing)} of {len(candidates)} ways to make them from its head's products agree"
    return agreeing[0]


def without_head(model: CausalLM) -> nn.Module:
    """The model below the head; some classes name another attribute than theirs as its place."""
    whole: Any = model
    return whole.model if whole.base_model is whole else whole.base_model  # AttributeError: it has none


def _few_tokens(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One row of tokens, the step's switches, and zeros for its other whole numbers per token, such as their types."""
    given = {name: value for name, value in inputs.items() if isinstance(value, bool)}
    row = (torch.arange(_TOKENS) % vocabulary_of(model))[None].to(inputs["labels"].device)
    types = [name for name in inputs if name.endswith("token_type_ids")]
    return given | {"input_ids": row} | {name: torch.zeros_like(row) for name in types}


def vocabulary_of(model: Any) -> int:
    """How many tokens a model has: by its configuration, or by the rows of its embedding where that has no size."""
    size: int | None = getattr(model.config.get_text_config(), "vocab_size", None)
    return len(model.get_input_embeddings().weight) if size is None else size


def _trained_beside(model: nn.Module, base: nn.Module, head: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained and neither the base model's nor the head's."""
    known = {id(each) for part in (base, head) for each in part.parameters()}
    return {name: each for name, each in model.named_parameters() if each.requires_grad and id(each) not in known}


@contextmanager
def undisturbed(model: nn.Module, base: nn.Module, device: torch.device) -> Iterator[None]:
    """Without gradients, the base model in evaluation mode; restores its modes and the state of random numbers.

    Linear layers keep their mode, which changes nothing that they return: on some CPUs bitsandbytes repacks 4-bit
    weights in evaluation, for good and with rounded scales. Hooks of users, which count and record steps, do not run.
    """
    training = [module for module in base.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            warnings.catch_warnings(action="ignore"),
            _without_hooks_of_users(model),
        ):
            for module in training:
                module.training = isinstance(module, nn.Linear)
            yield
    finally:
        for module in training:
            module.training = True
        torch.clear_autocast_cache()  # in some releases of torch it keeps casts without gradients


@contextmanager
def _without_hooks_of_users(model: nn.Module) -> Iterator[None]:
    """Suspend their forward hooks; those of libraries gather shards and move tensors between devices."""
    places = [place for module in model.modules() for place in (module._forward_pre_hooks, module._forward_hooks)]
    given = [(place, dict(place)) for place in places if place]
    for place, hooks in given:
        for number, hook in hooks.items():
            if not of_a_library(hook):
                del place[number]
    try:
        yield
    finally:
        for place, hooks in given:
            added = {number: hook for number, hook in place.items() if number not in hooks}  # by the first forward
            place.clear()
            place.update(hooks | added)


def of_a_library(hook: Callable[..., object]) -> bool:
    """Whether a function or a class is defined in a library that this package stands on, or in this package."""
    function = getattr(hook, "func", hook)  # that of a partial
    defined = getattr(function, "__module__", None) or type(function).__module__
    return defined.partition(".")[0] in _LIBRARIES


def _hidden(head: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Random hidden states [1, S, H] whose products with the head have the root mean squares `_SIZES` in turn."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
    sizes = torch.tensor(_SIZES, dtype=torch.float32, device=like.device).repeat(_TOKENS // len(_SIZES))[:, None]
    own = head(hidden).float().square().mean(-1, keepdim=True).sqrt().to(like.device)
    return (hidden.float() * (sizes / own)).to(like.dtype)


def _candidates(config: Any) -> Iterator[dict[str, float]]:
    text = config.get_text_config()
    scales = {1.0, *(factor for value in _values(text, _FACTORS) for factor in (value, 1.0 / value))}
    for scale, cap in itertools.product(sorted(scales), (0.0, *sorted(_values(text, _CAPS)))):
        yield {"logit_scale": scale, "softcap": cap}


def _values(config: Any, names: tuple[str, ...]) -> set[float]:
    found = (getattr(config, name, None) for name in names)
    return {float(value) for value in found if isinstance(value, int | float) and value > 0}


def _agree(logits: Tensor, products: Tensor, unit: float, logit_scale: float, softcap: float) -> bool:
    """Whether scaled and capped products are the logits, up to roundings; they may cancel in the product itself."""
    expected = products.double() * logit_scale
    if softcap:
        expected = softcap * (expected / softcap).tanh()
    size = expected.square().mean(-1, keepdim=True).sqrt()
    error = (logits.to(expected.device).double() - expected).abs()
    return bool((error <= _ROUNDINGS * unit * (expected.abs() + size)).all())


def _unit(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps / 2


def _norm(tensor: Tensor) -> float:
    return tensor.double().norm().item()
