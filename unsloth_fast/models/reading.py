"""What does the source of a forward show: which names it mentions, and what it does with its masks?"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch.nn import Module

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
MASK = "attention_mask"
MASKS = frozenset(("create_causal_mask", "create_sliding_window_causal_mask"))


def makes_masks(name: str) -> bool:
    """Whether a name is that of a function of transformers that makes masks."""
    return name.startswith("create_") and "mask" in name


@dataclass(frozen=True)
class Uses:
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
def uses_of(forward: Callable[..., Any]) -> Uses | None:
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
    masks = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == MASK]
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return Uses(
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


def code_of(module: Module) -> Any:
    """The code of the forward of a module's class; None for a scripted module."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def takes_mask(module: Module) -> bool:
    """Whether the forward of a module's class has a parameter attention_mask."""
    code = code_of(module)
    return code is not None and MASK in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def looks_up(module: Module) -> bool:
    """Whether the forward of a module's class, or a helper, uses transformers' attention interface."""
    return any(INTERFACE in function.__code__.co_names for function in functions_of(type(module)))


@cache
def functions_of(kind: type[Module]) -> list[FunctionType]:
    """The forward of a class, and its methods and the functions of their files that are called there."""
    found: list[FunctionType] = []
    waiting: list[Any] = [kind.forward]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if isinstance(function, FunctionType) and function not in found:
            found.append(function)
            for name in function.__code__.co_names:
                called = (getattr(kind, name, None), function.__globals__.get(name))
                waiting += [each for each in called if getattr(each, "__module__", "") == function.__module__]
    return found


def _receiver(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> str:
    """What a mask is passed to, as in `Uses.receivers`; "container" for an entry of a dict or a tuple."""
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
