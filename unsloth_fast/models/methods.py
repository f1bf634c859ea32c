"""Replacing a method of one instance, and restoring what the instance had before.

Classes stay untouched, and with them all other models of the process. The replacement is a bound method: copy.deepcopy
binds it to the copy, while a closure over the instance would keep calling the original.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, NamedTuple

from torch.nn import Module

Purpose = Literal["operation", "loss", "offloading", "head", "lists"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module

_RECORDS = "_unsloth_replaced"  # the attribute with an instance's replaced methods; absent where there are none


class _Replacement(NamedTuple):
    name: str
    purpose: Purpose
    function: Callable[..., Any]
    before: tuple[Any, ...]  # the instance's own attribute; empty where it had none and the class's method served


class _Records(tuple[_Replacement, ...]):
    """The replaced methods of an instance, the latest one last.

    Pickling drops them: functions that are made in other functions cannot be pickled, and the bound methods that call
    them are pickled by their name, as the class's own.
    """

    def __reduce__(self) -> tuple[type["_Records"], tuple[()]]:
        return _Records, ()

    def __deepcopy__(self, memo: dict[int, object]) -> "_Records":
        return _Records(copy.deepcopy(tuple(self), memo))


def replace_method(instance: object, name: str, function: Callable[..., object], purpose: Purpose) -> None:
    """Make `instance.name(...)` call `function(instance, ...)`.

    An attribute of that name that somebody else set on the instance, such as TRL's fused forward, is kept for
    `restore_method`. An earlier replacement for the same purpose is restored first.
    """
    restore_method(instance, name, purpose)
    own = vars(instance)
    before = (own[name],) if name in own else ()
    own[_RECORDS] = _Records((*own.get(_RECORDS, ()), _Replacement(name, purpose, function, before)))
    own[name] = MethodType(function, instance)


def restore_method(instance: object, name: str, purpose: Purpose) -> bool:
    """Give the instance back what `replace_method` found there, an attribute of somebody else or nothing.

    Returns:
        Whether there was something to restore. A method that somebody else has replaced since then stays as it is.
    """
    replacement = _current(instance, name)
    if replacement is None or replacement.purpose != purpose:
        return False
    own = vars(instance)
    own[_RECORDS] = _Records(record for record in own[_RECORDS] if record is not replacement)
    if not own[_RECORDS]:
        del own[_RECORDS]
    if replacement.before:
        (own[name],) = replacement.before
    else:
        del own[name]
    return True


@contextmanager
def replaced_method(instance: object, name: str, function: Callable[..., object], purpose: Purpose) -> Iterator[None]:
    """Replace the method within the context."""
    replace_method(instance, name, function, purpose)
    try:
        yield
    finally:
        restore_method(instance, name, purpose)


def has_own_method(instance: object, name: str) -> bool:
    """Whether the instance has a method that is not its class's, whoever set it.

    A pickled instance whose method was replaced has its class's, as its own attribute.
    """
    own = vars(instance).get(name)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(instance), name, None)


def has_replaced_method(instance: object, name: str) -> bool:
    """Whether the instance has a method that `replace_method` gave it."""
    return _current(instance, name) is not None


def hooks_of(module: Module) -> tuple[Callable[..., object], ...]:
    """The hooks that run when the module is called, and in the backward pass of the call."""
    return tuple(hook for name in HOOKS for hook in getattr(module, name).values())


def has_foreign_forward(module: Module) -> bool:
    """Whether a call of the module runs another forward than its class's.

    accelerate's, which moves inputs to the device of a module, calls the one that it found there.
    """
    own = vars(module)
    function = own.get("_old_forward" if "_hf_hook" in own else "forward")
    return function is not None and getattr(function, "__func__", None) is not type(module).forward


def is_more_than_its_operation(module: Module) -> bool:
    """Whether a call of the module does more than its class, or than the operation that is placed under it.

    If an operation of a larger module computed this one too, that would be left out.
    """
    own = _current(module, "forward")
    placed = own is not None and own.purpose == "operation"
    return bool(hooks_of(module)) or (has_own_method(module, "forward") and not placed)


def is_more_than_its_class(module: Module) -> bool:
    """Whether a call of the module does more than its class: by hooks, or by a forward that somebody has set.

    An operation that computes what the module does, without calling it, would leave that out.
    """
    return has_foreign_forward(module) or bool(hooks_of(module))


def _current(instance: object, name: str) -> _Replacement | None:
    """The replacement that `instance.name` calls; None if that is the class's method or somebody else's."""
    function = getattr(vars(instance).get(name), "__func__", None)
    records: tuple[_Replacement, ...] = vars(instance).get(_RECORDS, ())
    return next((record for record in reversed(records) if record.name == name and record.function is function), None)
