"""Exact arithmetic in Triton's interpreter: a stand-in for the floating-point sanitizer of a GPU.

Like FpSan it maps the bits of a number to an integer modulo 2^w (0, 1 and -1 to themselves) and computes with integers.
Its map and its functions are others, its identities are the same: those of a ring, exp2(x + y) = exp2(x) exp2(y), casts
that drop or repeat the upper bits. For float32 and float16.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle, interpreter_builder

from conformance.instruments.exact import Exact

INTEGER = {2: np.int16, 4: np.int32}
Array = Any  # numpy.ndarray of floats or integers


def _swapped(integers: Array, width: int) -> Array:
    """Exchanges the bits of 1.0 and -1.0 with the integers 1 and -1."""
    one = np.ones(1, np.float32 if width == 4 else np.float16).view(INTEGER[width])[0]
    minus = (-np.ones(1, np.float32 if width == 4 else np.float16)).view(INTEGER[width])[0]
    found = integers.copy()
    for left, right in ((one, 1), (minus, -1)):
        found[integers == left], found[integers == right] = right, left
    return found


def embed(numbers: Array) -> Array:
    numbers = np.ascontiguousarray(numbers)
    return _swapped(numbers.view(INTEGER[numbers.itemsize]), numbers.itemsize)


def unembed(integers: Array) -> Array:
    width = integers.itemsize
    return _swapped(np.ascontiguousarray(integers), width).view(np.float32 if width == 4 else np.float16)


def inverse(x: Array) -> Array:
    """The modular inverse of odd integers, by Newton's method; some fixed function of the even ones."""
    found = x.copy()
    for _ in range(5):
        found = found * (2 - x * found)
    return np.where(x & 1, found, x)


def power(x: Array) -> Array:
    """5^x: turns sums into products, because the order of 5 divides 2^w."""
    base, found = np.full_like(x, 5), np.ones_like(x)
    for bit in range(8 * x.itemsize):
        found = np.where((x >> bit) & 1, found * base, found)
        base = base * base
    return found


def tagged(tag: int) -> Callable[[Array], Array]:
    """Some fixed function of the integers."""
    return lambda x: (x * x.dtype.type(2 * tag + 3)) ^ x.dtype.type(12345 + tag)


BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "fadd": np.add,
    "fsub": np.subtract,
    "fmul": np.multiply,
    "fdiv": lambda x, y: x * inverse(y),
    "precise_divf": lambda x, y: x * inverse(y),
    "minimumf": np.minimum,
    "minnumf": np.minimum,
    "maximumf": np.maximum,
    "maxnumf": np.maximum,
}
UNARY: dict[str, Callable[[Array], Array]] = {
    "fneg": np.negative,
    "exp2": power,
    "exp": lambda x: power(x * x.dtype.type(7)),
    **{
        name: tagged(tag)
        for tag, name in enumerate(("log", "log2", "sqrt", "precise_sqrt", "rsqrt", "erf", "sin", "cos"))
    },
}


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., TensorHandle]:
    def create(self: Any, x: TensorHandle, y: TensorHandle) -> TensorHandle:
        return TensorHandle(unembed(function(embed(x.data), embed(y.data))), x.dtype.scalar)

    return create


def _unary(function: Callable[[Array], Array]) -> Callable[..., TensorHandle]:
    def create(self: Any, x: TensorHandle) -> TensorHandle:
        return TensorHandle(unembed(function(embed(x.data))), x.dtype.scalar)

    return create


def _fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    return TensorHandle(unembed(embed(x.data) * embed(y.data) + embed(z.data)), z.dtype.scalar)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any) -> TensorHandle:
    x, y = (embed(one.data).astype(INTEGER[d.data.itemsize]) for one in (a, b))
    return TensorHandle(unembed(x @ y + embed(d.data)), d.dtype.scalar)


def _cast(self: Any, x: TensorHandle, dtype: Any, *rounding: Any) -> TensorHandle:
    width = dtype.scalar.primitive_bitwidth // 8
    return TensorHandle(unembed(embed(x.data).astype(INTEGER[width])), dtype.scalar)


def _reduce(self: Any, operands: Any) -> Any:
    functions = {tl.standard._sum_combine: np.add, tl.standard._elementwise_max: np.maximum}
    values = operands[0] if isinstance(operands, tuple) else operands
    if self.combine_fn not in functions or not values.dtype.is_floating():
        return APPLY(self, operands)
    integers = embed(values.handle.data)
    found = functions[self.combine_fn].reduce(
        integers, axis=self.axis, keepdims=self.keep_dims, **({"dtype": integers.dtype})
    )
    return self.to_tensor(unembed(np.atleast_1d(found)).reshape(np.shape(found)), values.dtype)


APPLY = ReduceOps.apply_impl


@contextmanager
def exact_arithmetic(other_warps: bool = False) -> Iterator[Exact]:
    """As that of `conformance.instruments.exact`, in the interpreter; warps mean nothing there."""
    exact = Exact()
    run = interpreter.InterpretedFunction.run

    def seen(kernel: Any, *arguments: Any, **options: Any) -> Any:
        exact.kernels.add(kernel.fn.__name__)
        return run(kernel, *arguments, **options)

    functions = {name: _binary(function) for name, function in BINARY.items()}
    functions |= {name: _unary(function) for name, function in UNARY.items()}
    functions |= {"fma": _fma, "dot": _dot} | dict.fromkeys(("fp_to_fp", "fp_ext", "fp_trunc"), _cast)
    with ExitStack() as replaced, np.errstate(all="ignore"):
        for name, function in functions.items():
            replaced.enter_context(patch.object(InterpreterBuilder, f"create_{name}", function))
        replaced.enter_context(patch.object(ReduceOps, "apply_impl", _reduce))
        # Then operators go through the builder, see conformance/interpreter/operators.py.
        debugging = replace(interpreter_builder.options, debug=True)
        replaced.enter_context(patch.object(interpreter_builder, "options", debugging))
        replaced.enter_context(patch.object(interpreter.InterpretedFunction, "run", seen))
        yield exact
