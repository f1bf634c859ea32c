"""How an operation is called: which arguments go by position and which by name, and which tensors come back.

The inputs of a case are tensors by name. `xs[0]` and `xs[1]` are the elements of the list `xs`. An operation may work
in place on purpose: then it gets a copy of such an input, and the copy after the call is one more output. So every
property applies to it as to any other operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Arguments = tuple[list[Any], dict[str, Any]]


def grouped(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as keywords: tensors, and lists of those tensors that are elements of one."""
    found: dict[str, Any] = {}
    for name, tensor in inputs.items():
        group, bracket, _ = name.partition("[")
        if bracket:
            found.setdefault(group, []).append(tensor)
        else:
            found[name] = tensor
    return found


def placed(reference: Callable[..., Any], inputs: Mapping[str, Any]) -> Arguments:
    """The inputs as positional arguments, as far as they are the first parameters of the reference, and keywords."""
    by_name = grouped(inputs)
    positional: list[Any] = []
    for parameter in inspect.signature(reference).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += by_name.pop(parameter.name, [])
        if parameter.name not in by_name or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            break
        positional.append(by_name.pop(parameter.name))
    return positional, by_name


def results(found: Any, written: Sequence[Tensor]) -> list[Any]:
    """The outputs of a call: what it returned, out of tuples, lists and dicts, then what it wrote in place.

    A returned tensor that is one of those written is no further output.
    """
    memory = {tensor.untyped_storage().data_ptr() for tensor in written if tensor.numel()}
    returned = [one for one in tree_leaves(found) if one is not None]
    others = [one for one in returned if all(one is not tensor for tensor in written)]  # those without elements too
    own = [t for t in others if not isinstance(t, Tensor) or t.untyped_storage().data_ptr() not in memory]
    return [*own, *written]


def copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides and offset in a copy of all the memory around it, so that fences stay around it."""
    storage = tensor.untyped_storage()
    # A tensor whose elements share memory cannot be written in place; a huge one, with rows far apart, would not fit.
    if 0 in tensor.stride() or storage.nbytes() > 2**28 or torch.compiler.is_compiling():
        return tensor.clone(memory_format=torch.contiguous_format)
    own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    own.set_(storage.clone(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return own.copy_(tensor) if tensor.requires_grad else own  # for autograd


def return_surroundings(tensor: Tensor, copy: Tensor) -> None:
    """Write what lies around the copy into the memory around the tensor, where a fence may look at it."""
    storage, own = tensor.untyped_storage(), copy.untyped_storage()
    if own.nbytes() == storage.nbytes() > tensor.numel() * tensor.element_size():
        memory = own.clone()
        inside = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        inside.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride()).copy_(tensor.detach())
        storage.copy_(memory)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor that has elements lies in the memory of another, as a view does."""
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def as_function(found: Any, name: str) -> Callable[..., Any]:
    """A function, module, `torch.autograd.Function` or class of a module as a function with this name."""
    if isinstance(found, type) and issubclass(found, torch.autograd.Function):
        return _named(found.apply, name, _without_first(found), found)
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        found = found()
    if isinstance(found, torch.nn.Module):
        return _named(found, name, inspect.signature(found.forward))
    if isinstance(getattr(found, "__name__", None), str):
        return found
    return _named(found, name, inspect.signature(found))


def unadapted(function: Any) -> Any:
    """The object that `as_function` and `with_parameters_of` made this function from."""
    while "unadapted" in getattr(function, "__dict__", {}):
        function = function.unadapted
    return function


def _without_first(function: type[torch.autograd.Function]) -> inspect.Signature:
    """The signature of `apply`: that of `forward`, without the context unless `setup_context` gets it; positional."""
    parameters = list(inspect.signature(function.forward).parameters.values())
    if function.setup_context is torch.autograd.function._SingleLevelFunction.setup_context:
        parameters = parameters[1:]
    return inspect.Signature([p.replace(kind=p.POSITIONAL_ONLY) for p in parameters])


def _named(
    function: Callable[..., Any], name: str, signature: inspect.Signature, unadapted: Any = None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.unadapted = unadapted or function  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = name
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def with_parameters_of(reference: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the reference's parameter names, where its own differ or are positional-only.

    Parameters that have the same name are the same; the others that can be positional are matched in order. A
    parameter of the function without a default gets the reference's. Additional parameters with a default are allowed.
    """
    empty = inspect.Parameter.empty
    wanted, own = inspect.signature(reference).parameters, inspect.signature(function).parameters
    if list(wanted.values()) == list(own.values()):
        return function
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in own.values()):
        return _named(function, function.__name__, inspect.signature(reference))
    left = [p for p in own.values() if p.name not in wanted and p.kind is not p.KEYWORD_ONLY]
    matched: dict[str, inspect.Parameter] = {}
    for name, parameter in wanted.items():
        if name in own:
            matched[name] = own[name]
        elif left and parameter.kind is not parameter.KEYWORD_ONLY:
            matched[name] = left.pop(0)
    taken = {p.name for p in matched.values()}
    missing = [p.name for p in own.values() if p.default is empty and p.name not in taken]
    if missing:  # signature parity names them
        return function
    names = {name: p.name for name, p in matched.items()}
    positional = [p.name for p in own.values() if p.kind is p.POSITIONAL_ONLY]
    given_always = {
        names[name]: p.default
        for name, p in wanted.items()
        if name in names and p.default is not empty and (matched[name].default is empty or names[name] in positional)
    }
    defaults = {name: p.default for name, p in matched.items() if p.default is not empty}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(given_always)
        for name, value in (*zip(wanted, args, strict=False), *kwargs.items()):
            given[names.get(name, name)] = value
        return function(*[given.pop(name) for name in positional], **given)

    call.unadapted = function  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = function.__name__
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            p if p.default is empty else p.replace(default=defaults.get(name, p.default))
            for name, p in wanted.items()
            if name in matched
        ]
    )
    return call
