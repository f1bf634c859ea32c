"""Operators of tensors in Triton's interpreter, whose operands' types are analysed once and not at every use.

For `a + b` Triton finds the common type, converts and broadcasts both operands, and checks the result, in 30 calls of
Python functions, around one of NumPy that computes it. All of them depend on the types alone. So the first use with
two types goes through Triton; if NumPy's function gives the same bits, it computes later uses directly.

This holds for the operators in `_FUNCTIONS`, between tensors and between a tensor and a Python number, where both are
of a dtype in `_NUMBERS`; for those of bits between integers or masks; for a pointer plus an integer; for a subscript
that adds axes; and for `tl.where`. Everything else goes through Triton, as does everything while the option `debug` is
set, under which Triton looks for overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import numpy as np

Function = Callable[..., Any]

_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide}
_OF_BITS = {"__and__": np.bitwise_and, "__or__": np.bitwise_or, "__xor__": np.bitwise_xor}
# By the names of Triton's methods, of which those of arithmetic also have one for a tensor on the right.
_FUNCTIONS: dict[str, Function] = {
    **{"__lt__": np.less, "__le__": np.less_equal, "__gt__": np.greater, "__ge__": np.greater_equal},
    **{"__eq__": np.equal, "__ne__": np.not_equal},
    **_OF_BITS,
    **{f"__{name}__": function for name, function in _ARITHMETIC.items()},
    **{f"__r{name}__": lambda x, y, function=function: function(y, x) for name, function in _ARITHMETIC.items()},
}
_FLOATS = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32), "fp64": np.dtype(np.float64)}
_INTEGERS = {"int32": np.dtype(np.int32), "int64": np.dtype(np.int64)}
_NUMBERS = _FLOATS | _INTEGERS
_BITS = _INTEGERS | {"int1": np.dtype(np.bool_)}
_MASK = np.dtype(np.bool_)


class _Known(NamedTuple):
    """How to compute a result from two operands of known types.

    Attributes:
        function: of their arrays.
        dtypes: of these arrays; a Python number becomes an array of one element.
        common: to which both are converted; None to leave them.
        element: Triton's dtype of the result's elements; None for that of the first operand's, which of a mask is the
            dtype of the numbers whose comparison gave it.
        attributes: of the resulting tensor, besides its elements.
        alive: the operands' types, whose addresses stand for them.
    """

    function: Function
    dtypes: tuple[Any, Any]
    common: Any
    element: Any
    attributes: dict[str, Any]
    alive: Any

    def of(self, *arrays: Any) -> Any:
        """The resulting array; of three arrays, the first is a mask."""
        *mask, x, y = arrays
        if self.common is not None:
            x = x if x.dtype == self.common else x.astype(self.common)
            y = y if y.dtype == self.common else y.astype(self.common)
        return self.function(*mask, x, y)


def replaced(owner: Any, name: str, original: Function, interpreter: Any, core: Any) -> Function:
    """What computes the same as a function of the interpreter; the original if this module does not know its name.

    Args:
        owner: the class or module whose attribute it is.
        name: of the attribute.
        original: the function with which Triton patches it.
        interpreter: the module triton.runtime.interpreter.
        core: the module triton.language.core.
    """
    make = {"__add__": _addition, "__getitem__": _subscript}.get(name) if owner is core.tensor else None
    if make is not None:
        return make(original, interpreter, core)
    if owner is core.tensor and name in _FUNCTIONS:
        return _operator(name, original, interpreter, core)
    return _selection(original, interpreter, core) if name == "where" and owner is not core.tensor else original


def _operator(name: str, original: Function, interpreter: Any, core: Any) -> Function:
    """The method of `tensor` of this name, in `_FUNCTIONS`."""
    builder, constexpr, tensor = interpreter.interpreter_builder, core.constexpr, core.tensor
    new_tensor, new_handle, handle_type = tensor.__new__, interpreter.TensorHandle.__new__, interpreter.TensorHandle

    def method(self: Any, other: Any, **options: Any) -> Any:
        if type(other) is constexpr:
            other = other.value
        kind = type(other)
        if kind is tensor:
            key = id(vars(other.type))
        elif _usual(other):
            key = kind
        else:
            return original(self, other)
        uses = vars(self.type).setdefault(name, {})
        if key not in uses:
            result = original(self, other)
            uses[key] = _learnt(name, self, other, result, interpreter.interpreter_semantic)
            return result
        known = uses[key]
        if known is None or builder.options.debug:
            return original(self, other)
        x, y = self.handle.data, other.handle.data if kind is tensor else np.array([other], known.dtypes[1])
        if (x.dtype, y.dtype) != known.dtypes:
            return original(self, other)
        found, handle = new_tensor(tensor), new_handle(handle_type)
        handle.data, handle.dtype, handle.attr = known.of(x, y), known.element or self.handle.dtype, {}
        vars(found).update(known.attributes, handle=handle)
        return found

    return method


def _usual(number: Any) -> bool:
    """Whether something is a number for which Triton's dtype is int32 or float32, and so follows from its type."""
    if type(number) is int:
        return -(2**31) <= number < 2**31
    return type(number) is float and (number in (0, inf, -inf) or 2**-126 <= abs(number) < 2**128 - 2**104)


def _learnt(name: str, x: Any, y: Any, result: Any, semantic: Any) -> _Known | None:
    """How to compute what Triton has just computed; None if this module does not know."""
    number = isinstance(y, (int, float))
    kind = semantic.to_tensor(y).dtype if number else y.dtype
    function, common, element = _FUNCTIONS[name], None, None
    if name in _OF_BITS and x.dtype.name == kind.name and kind.name in _BITS:
        dtypes = _BITS[kind.name], _BITS[kind.name]
    elif name not in _OF_BITS and {x.dtype.name, kind.name} <= set(_FLOATS if "truediv" in name else _NUMBERS):
        wide = semantic.computation_type_impl(x.dtype, False, kind, number, "truediv" in name)
        common, element = _NUMBERS[wide.name], result.handle.dtype
        dtypes = _NUMBERS[x.dtype.name], common if number else _NUMBERS[kind.name]
    else:
        return None
    attributes = {key: value for key, value in vars(result).items() if key != "handle"}
    known = _Known(function, dtypes, common, element, attributes, None if number else (y.type, vars(y.type)))
    left, right = x.handle.data, np.array([y], dtypes[1]) if number else y.handle.data
    if (left.dtype, right.dtype) != dtypes:
        return None
    return known if _same_bits(known.of(left, right), result.handle.data) else None


def _addition(original: Function, interpreter: Any, core: Any) -> Function:
    """`tensor.__add__`, of pointers without learning their types: each launch has types of its own."""
    constexpr, tensor, handle_type = core.constexpr, core.tensor, interpreter.TensorHandle
    numbers = _operator("__add__", original, interpreter, core)

    def add(self: Any, other: Any, **options: Any) -> Any:
        if type(self.dtype) is not core.pointer_type:
            return numbers(self, other)
        places = other.value if type(other) is constexpr else other
        if type(places) is tensor and places.dtype.name in _INTEGERS:
            data, block = places.handle.data, places.type.is_block()
        elif type(places) is int and _usual(places):
            data, block = np.array([places], np.int32), False
        else:
            return original(self, other)
        try:
            width = max(1, self.handle.get_element_ty().primitive_bitwidth // 8)
            found = self.handle.data + width * data.astype(np.uint64)
        except ValueError:  # of shapes that differ, which Triton describes
            return original(self, other)
        block = block or self.type.is_block()
        kind = core.block_type(self.dtype, [*found.shape]) if block else self.type
        return tensor(handle_type(found, self.handle.dtype), kind)

    return add


def _subscript(original: Function, interpreter: Any, core: Any) -> Function:
    """`tensor.__getitem__`, which adds axes."""
    whole, tensor, handle_type = slice(None), core.tensor, interpreter.TensorHandle

    def getitem(self: Any, slices: Any, **options: Any) -> Any:
        if type(slices) is not tuple or not all(one is None or (type(one) is slice and one == whole) for one in slices):
            return original(self, slices)
        uses = vars(self.type).setdefault("__getitem__", {})
        key = tuple(one is None for one in slices)
        if key not in uses:
            result = original(self, slices)
            same = self.type.is_block() and _same_bits(self.handle.data[slices], result.handle.data)
            uses[key] = result.type if same else None
            return result
        if uses[key] is None:
            return original(self, slices)
        return tensor(handle_type(self.handle.data[slices], self.handle.dtype), uses[key])

    return getitem


def _same_bits(one: Any, other: Any) -> bool:
    same = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
    return same and one.tobytes() == other.tobytes()


def _selection(original: Function, interpreter: Any, core: Any) -> Function:
    """`tl.where`."""
    builder, constexpr, tensor = interpreter.interpreter_builder, core.constexpr, core.tensor
    semantic, handle_type = interpreter.interpreter_semantic, interpreter.TensorHandle

    def where(condition: Any, x: Any, y: Any, **options: Any) -> Any:
        x, y = (one.value if type(one) is constexpr else one for one in (x, y))
        if type(condition) is not tensor or not all(type(one) is tensor or _usual(one) for one in (x, y)):
            return original(condition, x, y)
        uses = vars(condition.type).setdefault("where", {})
        key = tuple(id(vars(one.type)) if type(one) is tensor else type(one) for one in (x, y))
        if key not in uses:
            result = original(condition, x, y)
            uses[key] = _learnt_selection(condition, x, y, result, semantic)
            return result
        known, mask = uses[key], condition.handle.data
        if known is None or builder.options.debug or mask.dtype != _MASK:
            return original(condition, x, y)
        arrays = _arrays(known, x, y)
        if tuple(array.dtype for array in arrays) != known.dtypes:
            return original(condition, x, y)
        found, handle = tensor.__new__(tensor), handle_type.__new__(handle_type)
        handle.data, handle.dtype, handle.attr = known.of(mask, *arrays), known.element, {}
        vars(found).update(known.attributes, handle=handle)
        return found

    return where


def _learnt_selection(condition: Any, x: Any, y: Any, result: Any, semantic: Any) -> _Known | None:
    """As `_learnt`, for `tl.where`."""
    numbers = [isinstance(one, (int, float)) for one in (x, y)]
    kinds = [
        semantic.to_tensor(one).dtype if number else one.dtype for one, number in zip((x, y), numbers, strict=True)
    ]
    if condition.dtype.name != "int1" or not {kind.name for kind in kinds} <= set(_NUMBERS):
        return None
    wide = semantic.computation_type_impl(kinds[0], numbers[0], kinds[1], numbers[1], False)
    common = _NUMBERS[wide.name]
    dtypes = tuple(common if number else _NUMBERS[kind.name] for kind, number in zip(kinds, numbers, strict=True))
    attributes = {key: value for key, value in vars(result).items() if key != "handle"}
    alive = [(one.type, vars(one.type)) for one, number in zip((x, y), numbers, strict=True) if not number]
    known = _Known(np.where, (dtypes[0], dtypes[1]), common, result.handle.dtype, attributes, alive)
    arrays, mask = _arrays(known, x, y), condition.handle.data
    if mask.dtype != _MASK or tuple(array.dtype for array in arrays) != dtypes:
        return None
    return known if _same_bits(known.of(mask, *arrays), result.handle.data) else None


def _arrays(known: _Known, *operands: Any) -> list[Any]:
    """The operands' arrays, of one element for a Python number."""
    pairs = zip(operands, known.dtypes, strict=True)
    return [np.array([one], dtype) if type(one) in (int, float) else one.handle.data for one, dtype in pairs]
