"""Triton's interpreter without what it does over and over."""

import importlib
from collections.abc import Callable
from functools import cache
from inspect import ismodule
from typing import Any


@cache
def patch() -> None:
    """Take two things out of the interpreter which our kernels would spend two fifths of their time on.

    It puts its own functions into `triton.language` at each call of a device function, where they stand since the
    launch, and it writes a table of all dtypes to look one up. Where a version of Triton has other functions for it,
    nothing is changed.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _Once(interpreter._patch_lang, interpreter._LangPatchScope)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _Remembered(interpreter._get_np_dtype)


class _Remembered:
    """In place of Triton's `_get_np_dtype`: asked once for a scalar dtype and all blocks that are made of it."""

    def __init__(self, numpy_dtype: Callable[[Any], Any]) -> None:
        self._numpy_dtype = numpy_dtype
        self._known: dict[str, Any] = {}

    def __call__(self, dtype: Any) -> Any:
        """NumPy's dtype for a scalar or a block of Triton's."""
        name = dtype.scalar.name
        if name not in self._known:
            self._known[name] = self._numpy_dtype(dtype)
        return self._known[name]


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
