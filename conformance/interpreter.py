"""Triton's interpreter without what it does over and over."""

import importlib
from collections.abc import Callable
from functools import cache
from inspect import ismodule
from typing import Any


@cache
def patch_language_once_a_launch() -> None:
    """Let it put its own functions into `triton.language` once a launch, not at each call of a device function.

    There they stand already; looking for them again is a third of the time of our kernels. Where a version of Triton
    has other functions for it, nothing is changed.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _Once(interpreter._patch_lang, interpreter._LangPatchScope)


class _Once:
    """In place of Triton's `_patch_lang`: within a launch, what a function sees is patched the first time alone."""

    def __init__(self, patch: Callable[[Any], Any], scope: Callable[[], Any]) -> None:
        self._patch, self._scope = patch, scope
        self._patched: set[frozenset[str]] = set()

    def __call__(self, function: Any) -> Any:
        """Patch the modules of the language that the function sees; returns what takes it back."""
        modules = (value.__name__ for value in function.__globals__.values() if ismodule(value))
        seen = frozenset(name for name in modules if name.startswith("triton.language"))
        if seen in self._patched:
            return self._scope()  # of no changes
        launch, scope = not self._patched, self._patch(function)
        self._patched.add(seen)
        if launch:
            restore = scope.restore

            def end() -> None:
                self._patched.clear()
                restore()

            scope.restore = end
        return scope
