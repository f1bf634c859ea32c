"""Layers with LoRA that read the same tensor, such as the projections of queries, keys and values: one operation.

The forward of an attention calls `self.q_proj(hidden_states)`, `self.k_proj(hidden_states)` and so on. It is compiled
again from its source (see `unsloth_fast.models.recompiled`): a statement before the first of these calls computes all
of them by lora_linears, and each call becomes an expression that takes its result:

    projected = project(self, hidden_states)
    query_states = (projected.pop("q_proj") if "q_proj" in projected else self.q_proj(hidden_states)).view(...)

So results belong to one call of the forward, and each is freed when the forward frees it. A layer that has no result,
as its adapters are merged or do more than LoRA, is called where it was.
"""

import ast
import inspect
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from types import FunctionType
from typing import Any, TypeGuard

from peft.tuners.lora import LoraLayer
from torch import nn

from unsloth_fast.backends import Backend
from unsloth_fast.models.lora import AdaptedLayer
from unsloth_fast.models.reading import name_of, tree_of

PROJECT, _PROJECTED = "unsloth_project", "unsloth_projected"  # variables in a forward

# Other statements may make another call of it, or in another context; other expressions, none.
_STATEMENTS = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Return | ast.If
_DEFERRED = ast.Lambda | ast.BoolOp | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def shared_layers(module: nn.Module, backend: Backend) -> list[AdaptedLayer]:
    """The layers with LoRA that the forward of a module's class calls with the same tensor; empty or at least two."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType) or not backend.fuses("lora_linears", "lora_linear"):
        return []
    adapted = [name for name, child in module.named_children() if isinstance(child, LoraLayer)]
    found = (AdaptedLayer.of(module, name, backend) for name in _names_of_one_input(forward, tuple(adapted)))
    layers = {layer.name: layer for layer in found if layer is not None}
    return [layers[name] for name in _names_of_one_input(forward, tuple(layers))]


@cache
def _names_of_one_input(forward: FunctionType, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the layers that a forward calls with the same tensor."""
    tree: Any = tree_of(forward)
    function = tree.body[0] if len(layers) > 1 and tree is not None else None
    calls = _calls_of_one_input(function, layers) if isinstance(function, ast.FunctionDef) else []
    return tuple(dict.fromkeys(map(_layer_of, calls)))


def share_input(function: ast.FunctionDef, layers: Collection[str]) -> bool:
    """Let a forward take the results of these layers from `PROJECT`, in place; False where that cannot be done."""
    calls = _calls_of_one_input(function, layers)
    if not calls:
        return False
    first = _statements_of(function, calls)[0]
    results: Any = ast.parse(f"{_PROJECTED} = {PROJECT}(self, {_input_of(calls[0])})").body[0]
    replacement = _Replaced(calls)
    function.body[first:] = [results, *map(replacement.visit, function.body[first:])]
    for node in (results, *replacement.made):
        ast.copy_location(node, calls[0])
        ast.fix_missing_locations(node)
    return True


def _calls_of_one_input(function: ast.FunctionDef, layers: Collection[str]) -> list[ast.Call]:
    """The calls of these layers with the same tensor, of two layers at least; the most, if there are several tensors.

    The tensor is a variable that is only passed to layers between the first and the last call. One call is made
    always, so that it is a tensor; others may depend on the module.
    """
    of_input: dict[str, list[ast.Call]] = {}
    always: list[ast.Call] = []
    for statement in function.body:
        always += _calls(statement, branches=False)
        for call in _calls(statement):
            if _layer_of(call) in layers:
                of_input.setdefault(_input_of(call), []).append(call)
    fitting = [
        calls
        for calls in of_input.values()
        if len(set(map(_layer_of, calls))) > 1
        and any(call in always for call in calls)
        and _is_only_passed_on(function, calls)
    ]
    return max(fitting, key=len, default=[])


def _calls(node: ast.AST, branches: bool = True) -> Iterator[ast.Call]:
    """The calls `self.LAYER(x)` of a variable that a statement always makes; with branches, if the module decides."""
    if isinstance(node, _DEFERRED) or (isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS)):
        return
    if isinstance(node, ast.If | ast.IfExp) and not (branches and _is_of_module(node.test)):
        return
    if _is_call_of_child(node) and len(node.args) == 1 and not node.keywords and name_of(node.args[0]):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, branches)


def _is_of_module(test: ast.expr) -> bool:
    """Whether a condition depends on the module alone."""
    return all(name_of(node) in ("", "self") for node in ast.walk(test)) and not any(
        isinstance(node, ast.Call) for node in ast.walk(test)
    )


def _is_call_of_child(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and name_of(node.func.value) == "self"


def _layer_of(call: Any) -> str:
    return call.func.attr


def _input_of(call: Any) -> str:
    return call.args[0].id


def _statements_of(function: ast.FunctionDef, calls: Sequence[ast.Call]) -> list[int]:
    """The places of the statements with these calls."""
    return [i for i, statement in enumerate(function.body) if any(node in calls for node in ast.walk(statement))]


def _is_only_passed_on(function: ast.FunctionDef, calls: Sequence[ast.Call]) -> bool:
    """Whether layers alone read the input of these calls from the first to the last, and no tensor changes there."""
    places = _statements_of(function, calls)
    nodes = [node for statement in function.body[places[0] : places[-1] + 1] for node in ast.walk(statement)]
    passed = {id(given) for node in nodes if _is_call_of_child(node) for given in node.args}
    same = all(id(node) in passed for node in nodes if name_of(node) == _input_of(calls[0]))
    return same and not any(map(_is_change_in_place, nodes))


def _is_change_in_place(node: ast.AST) -> bool:
    """Whether it may change a tensor, of which the input may be a view."""
    if isinstance(node, ast.Attribute):
        return node.attr.endswith("_") and not node.attr.endswith("__")
    return isinstance(node, ast.AugAssign) or (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load))


class _Replaced(ast.NodeTransformer):
    """Replaces calls of layers by their results, if there are some."""

    def __init__(self, calls: Sequence[ast.Call]) -> None:
        self.calls, self.made = calls, list[ast.expr]()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The result, or the call."""
        if node not in self.calls:
            return self.generic_visit(node)
        name = repr(_layer_of(node))
        made: Any = ast.parse(f"{_PROJECTED}.pop({name}) if {name} in {_PROJECTED} else None", mode="eval").body
        made.orelse = node
        self.made.append(made)
        return made
