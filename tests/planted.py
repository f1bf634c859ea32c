"""Fast kernels that are plain PyTorch, which takes no interpreter, and some of them wrong."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest

import unsloth_fast.kernels
from unsloth_ref import kernels as reference


def plant(monkeypatch: pytest.MonkeyPatch, **wrong: Callable[..., Any]) -> None:
    """Replace the fast kernels by these, and all others by the reference's under another identity."""
    for name in reference.__all__:
        function = getattr(reference, name)
        monkeypatch.setattr(unsloth_fast.kernels, name, wrong.get(name, wraps(function)(partial(function))))
