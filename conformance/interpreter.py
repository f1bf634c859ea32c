"""A monkeypatch that makes Triton's interpreter faster on a CPU, without changing what it computes.

`patch_for_speed` replaces two private functions of `triton.runtime.interpreter`, for the whole process:

    _patch_lang      Triton replaces the functions of `triton.language` by interpreted ones at every call of a device
                     function, although the launch has already done so. `_OncePerLaunch` skips the repetitions.
    _get_np_dtype    Triton builds a table of all dtypes at every lookup. `_Memoised` keeps the results.

These repetitions take two fifths of the time of the project's kernels in the interpreter. `conformance.backends.load`
applies the patch whenever a backend runs on a CPU with Triton loaded, other people's kernels included. A version of
Triton that lacks one of these functions stays as it is there.
"""

import importlib
from collections.abc import Callable
from functools import cache
from inspect import ismodule
from typing import Any


@cache
def patch_for_speed() -> None:
    """Apply the patch to Triton's interpreter, once per process; see the module's docstring."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _OncePerLaunch(interpreter._patch_lang, interpreter._LangPatchScope)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _Memoised(interpreter._get_np_dtype)


class _Memoised:
    """Replaces `_get_np_dtype`: computes the result once per scalar dtype, also for blocks of it."""

    def __init__(self, numpy_dtype: Callable[[Any], Any]) -> None:
        self._numpy_dtype = numpy_dtype
        self._known: dict[str, Any] = {}

    def __call__(self, dtype: Any) -> Any:
        """The NumPy dtype of a Triton scalar or block."""
        name = dtype.scalar.name
        if name not in self._known:
            self._known[name] = self._numpy_dtype(dtype)
        return self._known[name]


class _OncePerLaunch:
    """Replaces `_patch_lang`: within a launch, patches each set of language modules only the first time."""

    def __init__(self, patch: Callable[[Any], Any], scope: Callable[[], Any]) -> None:
        self._patch, self._scope = patch, scope
        self._patched: set[frozenset[str]] = set()

    def __call__(self, function: Any) -> Any:
        """Patch the language modules that the function refers to; returns the scope that restores them."""
        modules = (value.__name__ for value in function.__globals__.values() if ismodule(value))
        seen = frozenset(name for name in modules if name.startswith("triton.language"))
        if seen in self._patched:
            return self._scope()  # an empty scope: nothing to restore
        launch, scope = not self._patched, self._patch(function)
        self._patched.add(seen)
        if launch:
            restore = scope.restore

            def end() -> None:
                self._patched.clear()
                restore()

            scope.restore = end
        return scope
