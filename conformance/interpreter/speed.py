"""Triton's interpreter in a fifth of its time.

`patch_for_speed` replaces three private functions of `triton.runtime.interpreter`, and five methods of
`triton.language`, without changing what the interpreter computes:

    _patch_lang      Triton replaces the functions of `triton.language` by interpreted ones at every call of a device
                     function, although the launch has already done so. `_OncePerLaunch` skips the repetitions, and
                     searches the modules for these functions at the first launch alone.
    _patch_attr      Triton calls each function of `triton.language` through two others, and analyses the types of an
                     operator's operands at each use. The function is called directly, and the types are analysed once:
                     see conformance/interpreter/operators.py.
    _get_np_dtype    Triton builds a table of all dtypes at every lookup. `_Memoised` keeps the results.
    block_type       Triton checks and describes the same few types again for every result of an operation. Equal types
                     of the same elements share their attributes.
    tensor           The same for its shape, which depends on its type alone.
    broadcast_impl_value  Triton finds the common shape of two operands that have the same.
    binary_op_type_checking_impl  Triton finds the common type of two operands that have the same.
    binary_op_sanitize_overflow_impl  Triton computes whether an operation of integers overflows, by eight others, and
                     drops what it found unless the option `debug` is set, which it never is.

This takes four fifths of the time of the project's kernels in the interpreter. A version of Triton that lacks one of
these functions stays as it is there. One more function, `_patch_lang_tensor`, is replaced so that Triton 3.6 runs with
NumPy 2.4: a bound of a loop is an array of one number, which NumPy converts no more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from inspect import ismodule
from typing import Any

from conformance.interpreter import operators


@cache
def patch_for_speed() -> None:
    """Apply the patch to Triton's interpreter, once per process; see the module's docstring."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _OncePerLaunch(interpreter._patch_lang, interpreter._LangPatchScope)
        interpreter._patch_lang_tensor = _with_indices(interpreter._patch_lang_tensor)
    if hasattr(interpreter, "_patch_attr"):
        interpreter._patch_attr = _called_directly(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _Memoised(interpreter._get_np_dtype)
    core: Any = importlib.import_module("triton.language.core")
    core.block_type.__init__ = _shared_types(core.block_type.__init__)
    core.tensor.__init__ = _shared_shapes(core.tensor.__init__)
    semantic: Any = importlib.import_module("triton.language.semantic").TritonSemantic
    semantic.broadcast_impl_value = _broadcast_if_shapes_differ(semantic.broadcast_impl_value)
    semantic.binary_op_type_checking_impl = _converted_if_types_differ(semantic.binary_op_type_checking_impl)
    if hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        semantic.binary_op_sanitize_overflow_impl = _checked_if_debugging(semantic.binary_op_sanitize_overflow_impl)


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
        self._restores: list[Callable[[], None]] = []
        self._modules: dict[Any, frozenset[str]] = {}
        self._known: dict[Any, dict[tuple[Any, str], tuple[Any, Any]]] = {}  # values before the patch and after it

    def __call__(self, function: Any) -> Any:
        """Patch the language modules that the function refers to; returns the scope that restores them."""
        if function not in self._modules:
            modules = (value.__name__ for value in function.__globals__.values() if ismodule(value))
            self._modules[function] = frozenset(name for name in modules if name.startswith("triton.language"))
        seen = self._modules[function]
        if seen in self._patched:
            return self._scope()  # an empty scope: nothing to restore
        launch, scope = not self._patched, self._scope_of(function, seen)
        self._patched.add(seen)
        self._restores.append(scope.restore)
        if launch:
            scope.restore = self._end
        return scope

    def _end(self) -> None:
        """Restore all modules: Triton itself restores those of the kernel, and not those of its device functions."""
        self._patched.clear()
        while self._restores:
            self._restores.pop()()

    def _scope_of(self, function: Any, seen: frozenset[str]) -> Any:
        """Patch these modules; if they are as they were when this was last done, without a search of them."""
        key = seen, frozenset(self._patched)
        known = self._known.get(key, {})
        if known and all(getattr(*place, before) is before for place, (before, _) in known.items()):
            scope = self._scope()
            for place, (_, after) in known.items():
                scope.set_attr(*place, after)
            return scope
        scope, known = self._patch(function), self._known.setdefault(key, {})
        known.clear()
        for owner, name, before in scope._changes:  # the first change of a name has the value before the patch
            known.setdefault((owner, name), (before, getattr(owner, name)))
        return scope


def _called_directly(interpreter: Any) -> Callable[..., None]:
    """Replaces `_patch_attr`: the interpreted function calls what `triton.language` wraps; operators are known."""
    core: Any = importlib.import_module("triton.language.core")
    semantic, wrapper = interpreter.interpreter_semantic, core.builtin(lambda: None).__code__

    @wraps(interpreter._patch_attr)
    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def interpreted(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return inner(*arguments, **options)

        scope.set_attr(owner, name, operators.replaced(owner, name, interpreted, interpreter, core))

    return patch


def _with_indices(patch_tensor: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Replaces `_patch_lang_tensor`: an array of one number, whatever its dimensions, is an integer."""

    @wraps(patch_tensor)
    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def _shared_types(make: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Replaces the constructor of `block_type`: equal types of the same elements share their attributes."""

    @wraps(make)
    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        # Kept by the type of the elements, because a launch makes one of its own for each of its pointers.
        known = vars(element_ty).setdefault("blocks", {})
        if not all(type(size) is int for size in sizes) or sizes not in known:
            make(self, element_ty, shape)
            known[sizes] = vars(self)
        self.__dict__ = known[sizes]

    return init


def _shared_shapes(make: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Replaces the constructor of `tensor`: tensors of a type share their shape."""

    @wraps(make)
    def init(self: Any, handle: Any, type: Any) -> None:
        known = vars(type)
        if "tensor" not in known:
            make(self, handle, type)
            known["tensor"] = dict(vars(self))
        vars(self).update(known["tensor"], handle=handle, type=type)

    return init


def _broadcast_if_shapes_differ(broadcast: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Replaces `broadcast_impl_value`: returns two scalars, or two blocks of the same shape, as they are."""

    @wraps(broadcast)
    def method(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = (vars(operand.type).get("shape") for operand in (lhs, rhs))
        same = one is other or (one is not None and other is not None and [*one] == [*other])
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    return method


def _converted_if_types_differ(checked: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `binary_op_type_checking_impl`: operands of the same type are not converted, except for a quotient."""

    @wraps(checked)
    def method(self: Any, lhs: Any, rhs: Any, *allowed: bool, **how: bool) -> Any:
        one, other = (getattr(operand, "dtype", None) for operand in (lhs, rhs))  # a number has none
        quotient = len(allowed) > 3 or how.get("div_or_mod")
        if one is None or other is None or one.name != other.name or one.is_ptr() or quotient:
            return checked(self, lhs, rhs, *allowed, **how)
        return self.broadcast_impl_value(lhs, rhs)

    return method


def _checked_if_debugging(check: Callable[[Any, Any, Any, Any], None]) -> Callable[[Any, Any, Any, Any], None]:
    """Replaces `binary_op_sanitize_overflow_impl`, whose finding becomes an assertion only where `debug` is set."""

    @wraps(check)
    def method(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    return method
