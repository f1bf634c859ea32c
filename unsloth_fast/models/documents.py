"""What decides beside attention whether documents may share a row: positions, and layers that carry a state."""

import ast
import inspect
from collections.abc import Callable
from functools import cache

from torch.nn import Module
from transformers import PreTrainedModel

from unsloth_fast.models.mixers import CACHES, mixers_of
from unsloth_fast.models.reading import code_of, looks_up, makes_masks, name_of, tree_of

_POSITIONS = 4  # the index of position_ids among the parameters of transformers' functions that make masks


def finds_documents(stack: PreTrainedModel) -> bool:
    """Whether a stack gives position_ids to the functions that make its masks, which find documents by them."""
    classes = type(stack).__mro__
    return any(_gives_positions(each) for each in classes[: classes.index(PreTrainedModel)])


@cache
def _gives_positions(owner: type) -> bool:
    """Whether a method of the class calls a function that makes masks with position_ids; True without a source."""
    tree = tree_of(owner)
    if tree is None:
        return True
    makers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and makes_masks(node.id)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(name_of(part) in makers for part in ast.walk(node.value)):
            makers |= {name_of(target) for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in makers:
            given = {keyword.arg for keyword in node.keywords}
            if "position_ids" in given or len(node.args) > _POSITIONS:
                return True
            if None in given and "position_ids" in _keys(tree):
                return True
    return False


def _keys(tree: ast.AST) -> set[object]:
    """The constant keys of all dictionaries."""
    keys = (key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys)
    return {key.value for key in keys if isinstance(key, ast.Constant)}


def counts_tokens(model: Module) -> bool:
    """Whether an attention counts the tokens of a row itself, on through its documents."""
    return any(_counts(inspect.unwrap(type(module).forward)) for module in model.modules() if looks_up(module))


@cache
def _counts(forward: Callable[..., object]) -> bool:
    """Whether a forward counts on from the tokens of its cache, or computes with that count, and knows no position_ids.

    A range without the cache is one of distances, which are the same within a document.
    """
    tree = tree_of(forward)
    nodes = [] if tree is None else list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    read = {(name_of(node.value), node.attr) for node in nodes if isinstance(node, ast.Attribute)}
    counts = {"arange", "get_seq_length"} <= {attribute for _, attribute in read}
    return "position_ids" not in names and (counts or ("cache_position", "float") in read)


def carriers_of(model: Module) -> list[str]:
    """The classes of the modules that carry a state from token to token and are not recognised as mixers."""
    mixers = mixers_of(model)
    others = {type(module) for module in model.modules() if looks_up(module) or _hands_down(module)}
    left = (module for module in model.modules() if id(module) not in mixers and type(module) not in others)
    return sorted({type(module).__name__ for module in left if _takes_cache(module)})


def _hands_down(module: Module) -> bool:
    """Whether a module below takes a cache or attends. Others of the class take a cache for the sake of this one."""
    return any(other is not module and (_takes_cache(other) or looks_up(other)) for other in module.modules())


def _takes_cache(module: Module) -> bool:
    """Whether the forward of a module's class has a parameter for a cache."""
    code = code_of(module)
    return code is not None and not {*CACHES}.isdisjoint(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
