"""Which models take documents through transformers' attention interface, and what each forward shows of it?

Read once per class, from the source of its forwards: a stack of layers makes its masks by transformers' own functions,
its layers pass them on unchanged, and its attention looks its function up by the name in the config. Then a function
of ours may be looked up instead, and nothing else of the model changes.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsloth_fast.models.methods import has_own_method
from unsloth_fast.models.mixers import Mixer, mixers_of
from unsloth_ref import kernels as reference

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
MASKS = frozenset(("create_causal_mask", "create_sliding_window_causal_mask"))
DELEGATES = ("sdpa", "eager")
WIDEST = 512  # columns of a head that the judge holds packed_attention to
_MASK = "attention_mask"
_STATES = "create_recurrent_attention_mask"  # makes the masks of layers that carry a state
ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
_MLP_LAYERS = frozenset(("mlp", "moe"))  # Nemotron-H's layers are an attention, a mixer or an MLP
# What `packed_attention` is given of an attention function's keywords, and what it has no use for.
_KEYWORDS = frozenset((_MASK, "dropout", "scaling", "softcap", "sliding_window", "is_causal"))
_OF_MODULE = frozenset(("num_key_value_groups", "training", "head_dim"))  # what an eager attention may read


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
    """

    attentions: tuple[Module, ...] = ()
    foreign: str | None = None
    masked: str | None = None
    function: Callable[..., Any] | None = None
    sinks: bool = False
    mixers: Mapping[int, Mixer] = field(default_factory=dict)


def stacks_of(model: Module) -> Iterator[PreTrainedModel]:
    """The innermost models of transformers whose forward takes an attention_mask."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _takes_mask(module):
            below = (other for other in module.modules() if other is not module)
            if not any(isinstance(other, PreTrainedModel) for other in below):
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
        if module is stack or id(module) in mixers or not (_takes_mask(module) or looks_up(module)):
            continue
        uses = _uses(inspect.unwrap(type(module).forward))
        if looks_up(module):
            attentions.append(module)
        foreign = foreign or _foreign_layer(module, uses, stack)
    if not attentions:
        return Stack(foreign=foreign or "its attention does not use transformers' interface")
    if foreign is not None:
        return Stack(tuple(attentions), foreign)
    functions = {_function_of(attention, implementation) for attention in attentions}
    function = functions.pop()
    if functions or function is None:
        return Stack(tuple(attentions), "its eager attention function was not found")
    reasons = (_masked_attention(attention, function) for attention in attentions)
    sinks = "sinks" in _read_of(function)
    return Stack(tuple(attentions), None, next(filter(None, reasons), None), function, sinks, mixers)


def extras_of(function: Callable[..., object]) -> frozenset[str]:
    """The keywords of an attention function that `packed_attention` has no counterpart for."""
    parameters = inspect.signature(function).parameters.values()
    named = [entry for entry in parameters if entry.kind is entry.POSITIONAL_OR_KEYWORD][5:]  # module, q, k, v, mask
    return frozenset(entry.name for entry in named) - _KEYWORDS


def makes_masks(name: str) -> bool:
    """Whether a name is that of a function of transformers that makes masks."""
    return name.startswith("create_") and "mask" in name


@dataclass(frozen=True)
class _Uses:
    """What the source of a forward shows.

    Attributes:
        names: the names that it mentions.
        receivers: what it passes its attention_mask to: "self.NAME" or the name of a function. "" for any other use.
        functions: the names of variables that hold the attention function, and functions that make masks.
        eager: the name of the function for "eager"; None for none.
        alters: whether it computes with a mask that it made, by operators, methods, slices or another module.
        compares: whether it compares the implementation's name, other than with != "eager".
    """

    names: frozenset[str]
    receivers: frozenset[str]
    functions: frozenset[str]
    eager: str | None
    alters: bool
    compares: bool


@cache
def _uses(forward: Callable[..., Any]) -> _Uses | None:
    """What the source of a forward shows; None without a source."""
    tree = tree_of(forward)
    if tree is None:
        return None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    functions, eager = set(MASKS), None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            mentioned = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
            defaults = {name for name in mentioned if name.startswith("eager")}
            if mentioned & {INTERFACE, *MASKS} or defaults:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                functions |= {target.id for target in targets if isinstance(target, ast.Name)}
            eager = next(iter(defaults), eager)
    masks = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == _MASK]
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return _Uses(
        names=frozenset(names),
        receivers=frozenset(_receiver(node, parents) for node in masks),
        functions=frozenset(functions),
        eager=eager,
        alters=any(
            isinstance(node, ast.Name) and node.id in functions - MASKS and _is_altered(node, parents)
            for node in ast.walk(tree)
        ),
        compares=any("_attn_implementation" in ast.unparse(node) and not _is_eager_test(node) for node in compared),
    )


def tree_of(function: Callable[..., Any] | type) -> ast.AST | None:
    """The syntax tree of a function or class; None without a source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def name_of(node: ast.AST) -> str:
    """The name that a node is; "" for any other node."""
    return node.id if isinstance(node, ast.Name) else ""


def _receiver(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> str:
    """What a mask is passed to, as in `_Uses.receivers`; "container" for an entry of a dict or a tuple."""
    parent = parents[node]
    call = parents[parent] if isinstance(parent, ast.keyword) else parent
    if not isinstance(node.ctx, ast.Load):
        return ""
    if isinstance(call, ast.Call) and call.func is not node:
        func = call.func
        return (
            f"self.{func.attr}" if isinstance(func, ast.Attribute) and name_of(func.value) == "self" else name_of(func)
        )
    if isinstance(parent, ast.Dict | ast.Tuple | ast.List):
        return "container"
    return "isinstance" if isinstance(parent, ast.NamedExpr) and _is_type_test(parents[parent]) else ""


def _is_altered(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a mask goes elsewhere than into a layer."""
    parent = parents[node]
    call = parents[parent] if isinstance(parent, ast.keyword) else parent
    if isinstance(call, ast.Call) and call.func is not node and isinstance(call.func, ast.Attribute):
        return name_of(call.func.value) != "self"
    sliced = isinstance(parent, ast.Subscript) and isinstance(parent.slice, ast.Slice | ast.Tuple)
    if isinstance(parent, ast.Attribute) and parent.attr == "get":  # an entry of a dict of masks
        return False
    return sliced or isinstance(parent, ast.BinOp | ast.UnaryOp | ast.AugAssign | ast.Attribute)


def _is_type_test(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and name_of(node.func) == "isinstance"


def _is_eager_test(node: ast.Compare) -> bool:
    """Whether it is `... != "eager"`, which holds for any other name alike."""
    value = node.comparators[0]
    return isinstance(node.ops[0], ast.NotEq) and isinstance(value, ast.Constant) and value.value == "eager"


def code_of(module: Module) -> Any:
    """The code of the forward of a module's class; None for a scripted module."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _takes_mask(module: Module) -> bool:
    code = code_of(module)
    return code is not None and _MASK in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def looks_up(module: Module) -> bool:
    """Whether the forward of a module's class takes its attention function from transformers' interface."""
    code = code_of(module)
    return code is not None and INTERFACE in code.co_names


def _foreign_stack(stack: PreTrainedModel, mixers: int) -> str | None:
    """Why a stack's masks are left to transformers; it has so many mixers."""
    forward = inspect.unwrap(type(stack).forward)
    uses = _uses(forward)
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


def _foreign_layer(module: Module, uses: _Uses | None, stack: PreTrainedModel) -> str | None:
    """Why a layer or an attention below a stack cannot take another mask than transformers'."""
    name = type(module).__name__
    if uses is None or has_own_method(module, "forward"):
        return f"the forward of {name} is not its class's" if uses else f"{name} has no source"
    if not _takes_mask(module):
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
    uses = _uses(forward)
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
