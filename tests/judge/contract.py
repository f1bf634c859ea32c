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
