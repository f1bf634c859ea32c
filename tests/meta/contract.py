"""Backends written as plain functions."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

from unsloth_ref import kernels as reference

Function = Callable[..., Any]


def as_backend(op: str, function: Function) -> SimpleNamespace:
    """A backend with this operation alone: the function, under the name and the signature of the contract."""
    return SimpleNamespace(**{op: wraps(getattr(reference, op))(function)})
