"""Does an attention normalise the heads directly before it rotates them, so that one operation can compute both?

The attentions of Qwen3, Gemma 3 and others compute `q = self.q_norm(...)`, `k = self.k_norm(...)` and then call the
rotation of q and k. `move_norms` rewrites such a forward: the rotation receives the norms as arguments and applies
them. Between a norm and the rotation there may be a transposition of heads and tokens, which commutes with a norm over
the columns, and nothing else. Gemma 4 rotates q and k one by one: there each norm stands in the line before.
"""

import ast
import inspect
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_fast.models.methods import has_own_method, hooks_of
from unsloth_fast.models.norm import Norm, widened
from unsloth_fast.models.structure import Found, recognise

NAMES = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))


def norms_of(attention: nn.Module, known: dict[Hashable, Found]) -> Norm | None:
    """How the norms of an attention's heads work; None unless they are norms that work alike.

    There is one of q and one of k, unless the layer takes k from another layer.

    Args:
        attention: its norms have the forward of their class.
        known: as in `recognise`.
    """
    norms = norms_inside(attention)
    found = {None if has_own_method(norm, "forward") else recognise(norm, known) for norm in norms}
    how = found.pop() if len(found) == 1 else None
    if not isinstance(how, Norm) or not how.weighted:
        return None
    return how if len({getattr(norm, how.eps) for norm in norms}) == 1 else None


def norms_inside(attention: nn.Module) -> list[nn.Module]:
    """The norms of an attention's heads."""
    children = attention._modules
    return [norm for pair in NAMES for name in pair if (norm := children.get(name)) is not None]


def move_norms(function: ast.FunctionDef, rotation: str) -> bool:
    """Move the norms of a forward into the arguments of its rotation, in place; False where that cannot be done."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _is_name(node.func, rotation)]
    known = {name for pair in NAMES for name in pair}
    uses = sorted(node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr in known)
    names = next((pair for pair in NAMES if sorted(pair) == uses), ())
    found = _norms_of_both(function, calls, names) if len(calls) == 1 else _norms_of_each(function, calls, names)
    if len(found) != 2 or None in [norm for _, norm, _ in found]:
        return False
    for before, norm, call in found:
        assert norm is not None
        replacement = _Replaced(norm)
        for statement in before:
            replacement.visit(statement)
        call.args.append(norm.func)
    return True


_Moves = list[tuple[list[ast.stmt], ast.Call | None, ast.Call]]
"""Statements, the norm that they apply, and the rotation that may apply it instead."""


def _norms_of_both(function: ast.FunctionDef, calls: list[ast.Call], names: Sequence[str]) -> _Moves:
    """What the one call `q, k = f(q, k, cos, sin)` may apply."""
    (call,) = calls
    places = [index for index, statement in enumerate(function.body) if _rotates(statement, call, 2)]
    if len(places) != 1 or call.keywords or len(call.args) != 4:
        return []
    before = function.body[: places[0]]
    return [(before, _norm_of(before, heads, name), call) for heads, name in zip(call.args, names, strict=False)]


def _norms_of_each(function: ast.FunctionDef, calls: list[ast.Call], names: Sequence[str]) -> _Moves:
    """What `q = f(q, cos, sin, unsqueeze_dim=2)` and `k = f(k, ...)`, in any block right after the norms, may apply."""
    fields = [getattr(node, name, None) for node in ast.walk(function) for name in ("body", "orelse")]
    pairs = [pair for block in fields if isinstance(block, list) for pair in pairwise(block)]
    found: _Moves = []
    for call, name in zip(calls, names, strict=False):
        options = [(option.arg, ast.unparse(option.value)) for option in call.keywords]
        known = options in ([], [("unsqueeze_dim", "1")], [("unsqueeze_dim", "2")])
        before = [first for first, second in pairs if _rotates(second, call, 1)]
        if known and len(call.args) == 3 and len(calls) == 2 and before:
            found.append((before, _norm_of(before, call.args[0], name), call))
    return found


def rotation_with_norms(
    norm: Norm, qk_norm_rope: Callable[..., Any], separate: Callable[..., Any]
) -> Callable[..., Any]:
    """A rotation that receives the norms too: by the operation, or by the norms themselves and `separate`.

    The latter if somebody has replaced or hooked a norm, if heads have another layout than the operation's, or if the
    angles are learned.
    """

    def operation_of(q_norm: Any, *weights: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        options = {"eps": getattr(q_norm, norm.eps), "offset": norm.offset, "casting": norm.casting}

        def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
            return qk_norm_rope(q, k, *weights, cos, sin, **options)

        return rope

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Any, k_norm: Any) -> Any:
        norms = ((q, q_norm), (k, k_norm))
        if (
            q.dtype != k.dtype
            or cos.ndim != 3
            or are_learned(cos)
            or not all(_fits(heads, module) for heads, module in norms)
        ):
            return separate(q_norm(q), k_norm(k), cos, sin)
        q, k = (widened(norm, heads, module.weight) for heads, module in norms)
        return separate(q, k, cos, sin, rope=operation_of(q_norm, q_norm.weight, k_norm.weight))

    def one(x: Tensor, cos: Tensor, sin: Tensor, module: Any, **options: int) -> Any:
        if cos.ndim != 3 or are_learned(cos) or not _fits(x, module):
            return separate(module(x), cos, sin, **options)
        x, weight = widened(norm, x, module.weight), module.weight
        return separate(x, cos, sin, rope=operation_of(module, weight, weight.detach()), **options)

    return both if "k" in inspect.signature(separate).parameters else one


def are_learned(angles: Tensor) -> bool:
    """Whether the angles need a gradient, which no operation gives: Mistral Large 4 learns its frequencies."""
    return angles.requires_grad and torch.is_grad_enabled()


def _fits(heads: Tensor, norm: Any) -> bool:
    weight = getattr(norm, "weight", None)  # without memory while accelerate offloads it
    if weight is None or weight.is_meta or hooks_of(norm):
        return False
    return heads.ndim == 4 and weight.shape == heads.shape[-1:]


def _norm_of(before: list[ast.stmt], variable: ast.expr, name: str) -> ast.Call | None:
    """The call `self.NAME(...)` whose result, transposed or not, a variable holds after these statements."""
    if not isinstance(variable, ast.Name):
        return None
    using = [statement for statement in before if any(_is_name(node, variable.id) for node in ast.walk(statement))]
    last = using[-1] if using else None
    if not (isinstance(last, ast.Assign) and len(last.targets) == 1 and _is_name(last.targets[0], variable.id)):
        return None
    value = last.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "transpose":
        if sorted(ast.unparse(argument) for argument in value.args) != ["1", "2"]:
            return None
        value = value.func.value
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != f"self.{name}":
        return None
    return value if len(value.args) == 1 and not value.keywords else None


def _rotates(statement: ast.stmt, call: ast.Call, count: int) -> bool:
    """Whether a statement assigns the call's result to the variables that it rotates, its first arguments."""
    if not isinstance(statement, ast.Assign) or statement.value is not call or len(statement.targets) != 1:
        return False
    return ast.unparse(statement.targets[0]).strip("()") == ", ".join(map(ast.unparse, call.args[:count]))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


class _Replaced(ast.NodeTransformer):
    """Replaces a call by its first argument."""

    def __init__(self, call: ast.Call) -> None:
        self.call = call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The argument in place of the call."""
        return self.generic_visit(node) if node is not self.call else self.visit(node.args[0])
