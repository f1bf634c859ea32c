"""Does an attention normalise the heads directly before it rotates them, so that one operation can compute both?

The attentions of Qwen3, Gemma 3 and others compute `q = self.q_norm(...)`, `k = self.k_norm(...)` and then call the
rotation of q and k. `move_norms` rewrites such a forward: the rotation receives the norms as arguments and applies
them. Between a norm and the rotation there may be a transposition of heads and tokens, which commutes with a norm over
the columns, and nothing else.
"""

import ast
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from unsloth_fast.models.methods import has_own_method, hooks_of
from unsloth_fast.models.norm import Norm, widened
from unsloth_fast.models.structure import Found, recognise

NAMES = ("q_norm", "k_norm")


def norms_of(attention: nn.Module, known: dict[Hashable, Found]) -> Norm | None:
    """How both norms of an attention's heads work; None unless they are norms that work alike.

    Args:
        attention: its norms have the forward of their class.
        known: as in `recognise`.
    """
    norms = [attention._modules.get(name) for name in NAMES]
    found = [None if norm is None or has_own_method(norm, "forward") else recognise(norm, known) for norm in norms]
    how = found[0]
    if not isinstance(how, Norm) or found[1] != how:
        return None
    return how if len({getattr(norm, how.eps) for norm in norms}) == 1 else None


def move_norms(function: ast.FunctionDef, rotation: str) -> bool:
    """Move the norms of a forward into the arguments of its rotation, in place; False where that cannot be done."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _is_name(node.func, rotation)]
    places = [index for index, statement in enumerate(function.body) if _rotates(statement, calls)]
    if len(calls) != 1 or len(places) != 1 or calls[0].keywords or len(calls[0].args) != 4:
        return False
    before = function.body[: places[0]]
    norms = [_norm_of(before, variable, name) for variable, name in zip(calls[0].args, NAMES, strict=False)]
    uses = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr in NAMES]
    if None in norms or sorted(uses) != sorted(NAMES):
        return False
    for norm in norms:
        assert norm is not None
        replacement = _Replaced(norm)
        for statement in before:
            replacement.visit(statement)
        calls[0].args.append(norm.func)
    return True


def rotation_with_norms(
    norm: Norm, qk_norm_rope: Callable[..., Any], separate: Callable[..., Any]
) -> Callable[..., Any]:
    """A rotation that receives the norms too: by the operation, or by the norms themselves and `separate`.

    The latter if somebody has replaced or hooked a norm, or if heads have another layout than the operation's.
    """

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Any, k_norm: Any) -> Any:
        norms = ((q, q_norm), (k, k_norm))
        if q.dtype != k.dtype or cos.ndim != 3 or not all(_fits(heads, module) for heads, module in norms):
            return separate(q_norm(q), k_norm(k), cos, sin)
        q, k = (widened(norm, heads, module.weight) for heads, module in norms)
        options = {"eps": getattr(q_norm, norm.eps), "offset": norm.offset, "casting": norm.casting}

        def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
            return qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, **options)

        return separate(q, k, cos, sin, rope=rope)

    return rotate


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


def _rotates(statement: ast.stmt, calls: list[ast.Call]) -> bool:
    return isinstance(statement, ast.Assign) and statement.value in calls


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


class _Replaced(ast.NodeTransformer):
    """Replaces a call by its first argument."""

    def __init__(self, call: ast.Call) -> None:
        self.call = call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The argument in place of the call."""
        return self.generic_visit(node) if node is not self.call else self.visit(node.args[0])
