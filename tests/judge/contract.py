"""Backends that are written as plain functions."""

from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import torch

from unsloth_ref import kernels as reference

Function = Callable[..., Any]


def as_backend(op: str, function: Function) -> SimpleNamespace:
    """A backend with one operation: this function, with the name and the signature of the contract."""
    return SimpleNamespace(**{op: wraps(getattr(reference, op))(function)})


def compiled(function: Function) -> Function:
    """torch.compile of a function, delayed until its first call, because compiling imports triton."""

    @cache
    def compile_once() -> Function:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        return compile_once()(*inputs, **options)

    return call


# By dotted path: operation, properties of which one finds it, dtype.
WRONG: dict[str, tuple[str, tuple[str, ...], str]] = {}


def wrong(
    op: str, *properties: str, dtype: str = "float32", contract: bool = True
) -> Callable[[Function], SimpleNamespace]:
    """Make a function a wrong backend, with the contract's signature or, without contract, its own."""

    def register(function: Function) -> SimpleNamespace:
        WRONG[f"{function.__module__}.{function.__name__}"] = op, properties, dtype
        return as_backend(op, function) if contract else SimpleNamespace(**{op: function})

    return register
