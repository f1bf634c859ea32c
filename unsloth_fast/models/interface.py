"""Which models take documents through transformers' attention interface, and what each forward shows of it?

Read once per class, from the source of its forwards: a stack of layers makes its masks by transformers' own functions,
its layers pass them on unchanged, and its attention looks its function up by the name in the config. Then a function
of ours may be looked up instead, and nothing else of the model changes. Where the source of forwards does not show
this, as with masks that a helper makes, a run of three tokens does (see `unsloth_fast.models.wiring`).
"""

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsloth_fast.models.logits import of_a_library
from unsloth_fast.models.methods import has_own_method
from unsloth_fast.models.mixers import Mixer, mixers_of
from unsloth_fast.models.reading import (
    INTERFACE,
    MASK,
    MASKS,
    Uses,
    functions_of,
    looks_up,
    makes_masks,
    name_of,
    takes_mask,
    tree_of,
    uses_of,
)
from unsloth_fast.models.wiring import wired_attentions
from unsloth_ref import kernels as reference

DELEGATES = ("sdpa", "eager")
WIDEST = 512  # columns of a head that the judge holds packed_attention to
_STATES = "create_recurrent_attention_mask"  # makes the masks of layers that carry a state
ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
_MLP_LAYERS = frozenset(("mlp", "moe"))  # Nemotron-H's layers are an attention, a mixer or an MLP
# What `packed_attention` is given of an attention function's keywords, and what it has no use for.
_KEYWORDS = frozenset((MASK, "dropout", "scaling", "softcap", "sliding_window", "is_causal"))
_OF_MODULE = frozenset(("num_key_value_groups", "training", "head_dim"))  # what an eager attention may read
_NO_INTERFACE = "its attention does not use transformers' interface"
# Parts of the reasons that a run may refute: the source does not show where masks come from or where they go.
_UNSEEN = ("its masks", "changes its mask", _NO_INTERFACE)


@dataclass(frozen=True)
class Stack:
    """How a stack of layers attends to packed documents.

    Attributes:
        attentions: the modules below it that look up their attention function.
        foreign: why its masks and its attention are left to transformers; None if they are not.
        masked: why documents are kept apart by a mask for the attention it had before; None if `packed_attention`
            keeps them apart.
        function: the attention function that it had before; None if it is foreign.
        sinks: whether that function reads sinks of its module.
        mixers: the modules below it that carry a state from token to token and are recognised, by their id.
        wired: whether a run of a few tokens showed that it is not foreign, not the source.
    """

    attentions: tuple[Module, ...] = ()
    foreign: str | None = None
    masked: str | None = None
    function: Callable[..., Any] | None = None
    sinks: bool = False
    mixers: Mapping[int, Mixer] = field(default_factory=dict)
    wired: bool = False


def stacks_of(model: Module) -> Iterator[PreTrainedModel]:
    """The innermost models of transformers whose forward takes an attention_mask; towers of images take none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and takes_mask(module):
            below = (other for other in module.modules() if other is not module)
            if not any(isinstance(other, PreTrainedModel) and takes_mask(other) for other in below):
                yield module


def examine(stack: PreTrainedModel, implementation: str | None) -> Stack:
    """How a stack of layers takes packed documents, its forwards being those of the classes.

    Args:
        stack: one of `stacks_of`.
        implementation: the attn_implementation that it has without ours.
    """
    foreign = None if implementation in DELEGATES else f"attn_implementation={implementation}"
    mixers = mixers_of(stack)
    foreign = foreign or _foreign_stack(stack, len(mixers))
    attentions: list[Module] = []
    for module in stack.modules():
        if module is stack or id(module) in mixers or not (takes_mask(module) or looks_up(module)):
            continue
        uses = uses_of(inspect.unwrap(type(module).forward))
        if looks_up(module):
            attentions.append(module)
        foreign = foreign or _foreign_layer(module, uses, stack)
    foreign = foreign or (None if attentions else _NO_INTERFACE)
    wired: list[Module] = []
    if foreign is not None and not mixers and _may_be_wired(stack, foreign):
        wired = wired_attentions(stack, str(implementation), lambda module: _function_of(module, implementation))
    if foreign is not None and not wired:
        return Stack(tuple(attentions), foreign)
    attentions = wired or attentions
    functions = {_function_of(attention, implementation) for attention in attentions}
    function = functions.pop()
    if functions or function is None:
        return Stack(tuple(attentions), "its eager attention function was not found")
    masked = next(filter(None, (_masked_attention(attention, function) for attention in attentions)), None)
    if wired and masked:  # packed.py checks each mask of a packed batch, which it cannot under masks of transformers
        return Stack(tuple(attentions), masked)
    sinks = "sinks" in _read_of(function)
    return Stack(tuple(attentions), None, masked, function, sinks, mixers, bool(wired))


def _may_be_wired(stack: PreTrainedModel, reason: str) -> bool:
    """Whether a run can show where masks go: no state, and no other way for another name of the attn_implementation."""
    if not any(part in reason for part in _UNSEEN) or getattr(stack, "_is_stateful", False):
        return False
    kinds = {type(each) for each in stack.modules() if takes_mask(each) or looks_up(each)}
    kinds |= {type(each) for each in stack.modules() if not of_a_library(type(each))}
    uses = [uses_of(function) for kind in kinds for function in functions_of(kind)]
    return all(each is not None and not each.compares for each in uses)


def extras_of(function: Callable[..., object]) -> frozenset[str]:
    """The keywords of an attention function that `packed_attention` has no counterpart for."""
    parameters = inspect.signature(function).parameters.values()
    named = [entry for entry in parameters if entry.kind is entry.POSITIONAL_OR_KEYWORD][5:]  # module, q, k, v, mask
    return frozenset(entry.name for entry in named) - _KEYWORDS


def takes_cap(function: Callable[..., object] | None) -> bool:
    """Whether an attention function applies a cap on the scores, or refuses one; transformers' sdpa until 5.22 did not.

    One that is not known, or without source, is believed to.
    """
    tree = None if function is None else tree_of(function)
    return tree is None or "softcap" in ast.unparse(tree)


def _foreign_stack(stack: PreTrainedModel, mixers: int) -> str | None:
    """Why a stack's masks are left to transformers; it has so many mixers."""
    forward = inspect.unwrap(type(stack).forward)
    uses = uses_of(forward)
    made = set() if uses is None else set(filter(makes_masks, uses.names))
    if uses is None or not made & MASKS:
        return "its masks are its own"
    if getattr(stack, "_is_stateful", False) or _STATES in made:
        layers = getattr(stack.config, "layer_types", None) or ()
        if not mixers or mixers != sum(kind not in ATTENTION_LAYERS | _MLP_LAYERS for kind in layers):
            return "its layers carry a state"
    if made - MASKS - {_STATES}:
        return f"its masks: {', '.join(sorted(made - MASKS - {_STATES}))}"
    own = [name for name in made if forward.__globals__.get(name) is not getattr(masking_utils, name)]
    if own or uses.alters or uses.receivers - uses.functions - {_STATES, "container", "isinstance"}:
        return "it changes its masks"
    return "it compares the name of its attn_implementation" if uses.compares else None


def _foreign_layer(module: Module, uses: Uses | None, stack: PreTrainedModel) -> str | None:
    """Why a layer or an attention below a stack cannot take another mask than transformers'."""
    name = type(module).__name__
    if uses is None or has_own_method(module, "forward"):
        return f"the forward of {name} is not its class's" if uses else f"{name} has no source"
    if not takes_mask(module):
        return f"{name} takes its mask by another name"
    alike = (other for other in stack.modules() if type(other) is type(module))  # whose layer may be of another kind
    children = {f"self.{child}" for other in alike for child in other._modules}
    if uses.receivers - children - (uses.functions if looks_up(module) else set()):
        return f"{name} changes its mask"
    if uses.compares:
        return f"{name} compares the name of its attn_implementation"
    if looks_up(module):
        found = inspect.unwrap(type(module).forward).__globals__.get(INTERFACE)
        if found is not ALL_ATTENTION_FUNCTIONS or getattr(module, "config", None) is not stack.config:
            return f"{name} has an interface of its own"
    return None


def _function_of(attention: Module, implementation: str | None) -> Callable[..., Any] | None:
    """The attention function that a module has with this implementation."""
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    forward = inspect.unwrap(type(attention).forward)
    uses = uses_of(forward)
    return None if uses is None or uses.eager is None else forward.__globals__.get(uses.eager)


def _masked_attention(attention: Any, function: Callable[..., Any]) -> str | None:
    """Why `packed_attention` does not compute what the attention function of a module does."""
    if not getattr(attention, "is_causal", True):
        return "not causal"
    dropouts = (getattr(attention, name, 0.0) for name in ("attention_dropout", "attn_dropout"))
    for dropout in dropouts:
        if isinstance(dropout, float) and dropout > 0:
            return f"attention_dropout={dropout}"
    width = getattr(attention, "head_dim", 0)
    if isinstance(width, int) and width > WIDEST:
        return f"heads of {width} columns, above {WIDEST}"
    return _reads_of_its_own(function)


@cache
def _reads_of_its_own(function: Callable[..., Any]) -> str | None:
    """What an eager attention function uses that `packed_attention` is not given."""
    if function is ALL_ATTENTION_FUNCTIONS["sdpa"]:
        return None
    tree, read = tree_of(function), _read_of(function)
    if tree is None:
        return "an eager attention without source"
    if read - _OF_MODULE - {"sinks"}:
        return f"{', '.join(sorted(read - _OF_MODULE - {'sinks'}))} in its eager attention"
    if "sinks" in read and not _has_sinks(function):
        return "sinks of another kind in its eager attention"
    loaded = any(isinstance(node, ast.Name) and node.id == "kwargs" for node in ast.walk(tree))
    return "keywords in its eager attention" if loaded else None


def _read_of(function: Callable[..., Any]) -> set[str]:
    """The attributes of its module that the source of an attention function reads."""
    tree, module = tree_of(function), next(iter(inspect.signature(function).parameters))
    nodes = () if tree is None else ast.walk(tree)
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and name_of(node.value) == module}


def _has_sinks(function: Callable[..., Any]) -> bool:
    """Whether an attention function takes the sinks of its module as `packed_attention` does.

    Checked in float32, for means of numbers up to 1: weights have about 20 roundings, of at most 2^-24 each.
    """
    draw = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    q, k, v, sinks = draw(5, 4, 8), draw(5, 2, 8), draw(5, 2, 8), draw(4)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=2, head_dim=8, training=False)
    mask = torch.full((1, 1, 5, 5), -torch.inf, device="cpu").triu(1)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    try:
        with torch.no_grad():
            found, _ = function(module, *heads, mask, scaling=0.3)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    bounds = torch.tensor([0, 5], dtype=torch.int32, device="cpu")
    expected = reference.packed_attention(q, k, v, bounds, 5, scale=0.3, sinks=sinks)
    return found.shape[1:] == expected.shape and bool(((found[0] - expected).abs() <= 20 * 2.0**-24).all())
