"""The forward of a class, compiled again from its source: with other functions, and projections of one input together.

See `unsloth_fast.models.attention` and `unsloth_fast.models.projections`.
"""

import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from unsloth_fast.models.head_norms import move_norms
from unsloth_fast.models.projections import PROJECT, share_input

Make = Callable[..., Callable[..., Any]]


@cache
def recompiled(
    forward: FunctionType, names: tuple[str, ...], *, shared: tuple[str, ...], norms: bool = False
) -> Make | None:
    """The forward, compiled again: takes functions for these names, and returns the forward that calls them.

    Args:
        forward: of a class.
        names: of the functions that are replaced, globals of its file.
        norms: whether the one function applies the norms of the heads too (see `move_norms`).
        shared: layers that the forward calls with the same variable. If there are some, `make` takes one more function,
            which computes them (see `share_input`).

    Returns:
        None if that cannot be done, if the source is not that of the forward, or if it uses what the class alone
        provides.
    """
    code = forward.__code__
    try:
        lines, first = inspect.getsourcelines(forward)
        own = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    variables = (*names, PROJECT) if shared else names
    tree = ast.parse(f"def make({', '.join(variables)}):\n    return {forward.__name__}")
    function: Any = ast.increment_lineno(own, first - 1).body[0]
    tree.body[0].body.insert(0, function)  # type: ignore[attr-defined]

    def make() -> Make:
        options = code.co_flags & __future__.annotations.compiler_flag
        made: dict[str, Any] = {}
        exec(compile(tree, code.co_filename, "exec", options, dont_inherit=True), forward.__globals__, made)
        return made["make"]

    again = inspect.unwrap(make()(*variables)).__code__
    same = set(again.co_names) == set(code.co_names) - set(names) and again.co_varnames == code.co_varnames
    if not same or code.co_freevars:
        return None
    if (norms and not move_norms(function, names[0])) or (shared and not share_input(function, shared)):
        return None
    return make()
