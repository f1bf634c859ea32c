"""A kernel in Triton's interpreter computes what it would on a GPU.

`compute_as_a_gpu` changes, in `triton.runtime.interpreter` and `triton.language`:

    create_exp2                  Float32 results below the normal numbers become 0; those of tl.exp do not.
    create_sqrt, create_rsqrt    Float32 arguments below the normal numbers count as 0; those of tl.sqrt_rn do not.
    unary_op, binary_op, ternary_op, cast_impl
                                 Numbers in bfloat16 are computed in float32 and rounded to nearest. The interpreter
                                 computes with their bits, as if these were integers.
    create_fma, create_dot, ReduceOps.apply, ScanOps.apply
                                 The same.
    get_bf16                     A constant in bfloat16, which Triton 3.6 has not.
    create_extern_elementwise    Functions of libdevice are computed by torch; the interpreter has none of them.
    libdevice                    Its functions call those of CUDA; a compiler would replace them by name.
    _implicit_cvt                A float among a kernel's arguments is a float32 scalar. The interpreter leaves it a
                                 number of Python, which has no `.to`, and with which 16 bits stay 16 bits.
    constexpr                    A global `tl.constexpr` may stand left of a tensor.
    GridExecutor.__call__        NumPy does not warn of an overflow or of 0 / 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial, wraps
from inspect import isfunction
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What libdevice's functions compute, named as there, without `__nv_` and the letter of the type.
LIBDEVICE: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "copysign", "cos", "cosh", "erf", "erfc",
        "erfinv", "exp", "exp2", "expm1", "floor", "fmod", "hypot", "isnan", "lgamma", "log", "log10", "log1p", "log2",
        "pow", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
    )},
    "abs": torch.abs, "fabs": torch.abs, "llabs": torch.abs,
    "rint": torch.round, "nearbyint": torch.round,
    "round": lambda x: torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x)),
    "isinf": torch.isinf, "finite": torch.isfinite, "isfinite": torch.isfinite, "signbit": torch.signbit,
    "exp10": lambda x: 10.0**x, "powi": torch.pow, "ldexp": torch.ldexp,
    "fma": lambda x, y, z: x * y + z, "fdim": lambda x, y: (x - y).clamp(min=0), "saturate": lambda x: x.clamp(0, 1),
    "normcdf": torch.special.ndtr,
    "fast_exp": torch.exp, "fast_exp10": lambda x: 10.0**x, "fast_log": torch.log, "fast_log2": torch.log2,
    "fast_log10": torch.log10, "fast_pow": torch.pow, "fast_fdivide": torch.div, "fast_sin": torch.sin,
    "fast_cos": torch.cos, "fast_tan": torch.tan,
    **{f"{of}{name}_rn": function for of in "fd" for name, function in (
        ("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("div", torch.div), ("sqrt", torch.sqrt),
        ("rcp", torch.reciprocal),
    )},
    "frsqrt_rn": torch.rsqrt, "fma_rn": lambda x, y, z: x * y + z,
    "float2int_rn": torch.round, "float2int_rz": torch.trunc, "int2float_rn": lambda x: x,
}  # fmt: skip
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@cache
def compute_as_a_gpu() -> None:
    """Apply the changes to Triton's interpreter, once per process; imports triton."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    builder.create_exp2 = lambda self, x: self.unary_op(x, lambda data: _flushed(np.exp2(data)))
    builder.create_sqrt = lambda self, x: self.unary_op(x, lambda data: np.sqrt(_flushed(data)))
    builder.create_rsqrt = lambda self, x: self.unary_op(x, lambda data: 1 / np.sqrt(_flushed(data)))
    builder.create_extern_elementwise = _extern_elementwise
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, _of_bfloat16(getattr(builder, name)))
    builder.create_dot = _of_wide_operands(builder.create_dot)
    interpreter.ReduceOps.apply = _over_numbers(interpreter.ReduceOps.apply)
    interpreter.ScanOps.apply = _over_numbers(interpreter.ScanOps.apply)
    builder.create_fma = lambda self, x, y, z: self.ternary_op(x, y, z, lambda x, y, z: x * y + z)
    builder.get_bf16 = lambda self, value: _rounded(self.get_fp32(value).data)
    builder.cast_impl = _to_bfloat16(builder.cast_impl)
    interpreter.GridExecutor.__call__ = np.errstate(all="ignore")(interpreter.GridExecutor.__call__)
    interpreter._implicit_cvt = _with_float32_scalars(interpreter._implicit_cvt)
    core: Any = importlib.import_module("triton.language.core")
    for name in (*_ARITHMETIC, *_COMPARISONS):
        method = f"__{name}__"
        if method in vars(core.constexpr):
            setattr(core.constexpr, method, _left_to_tensors(getattr(core.constexpr, method), core.tensor))
    _call_libdevice(interpreter.interpreter_semantic)


def _flushed(value: Any) -> Any:
    """The range of PTX's .ftz: float32 below the normal numbers is 0."""
    small = (value.dtype == np.float32) & (np.abs(value) < np.finfo(np.float32).tiny)
    return np.where(small, np.copysign(np.zeros_like(value), value), value)


def _handle(data: Any, dtype: str) -> Any:
    """The interpreter's form of an array: with Triton's dtype of this name."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    return interpreter.TensorHandle(data, getattr(importlib.import_module("triton.language"), dtype))


def _widened(handle: Any) -> Any:
    """The handle, with bfloat16 numbers in float32."""
    if handle.dtype.name != "bf16":
        return handle
    return _handle((handle.data.astype(np.uint32) << 16).view(np.float32), "float32")


def _rounded(data: Any) -> Any:
    """A handle of float32 numbers rounded to the nearest of bfloat16, ties to even."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return _handle(np.where(np.isnan(data), quiet, nearest).astype(np.uint16), "bfloat16")


def _of_bfloat16(method: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a method that applies a function of NumPy to handles: those in bfloat16 are numbers, not bits."""

    @wraps(method)
    def computed(self: Any, first: Any, *others: Any) -> Any:
        if first.dtype.name != "bf16":  # all are of one dtype, except in a selection, which may select bits
            return method(self, first, *others)
        *handles, function = first, *others
        result = method(self, *(_widened(one) for one in handles), function)
        return _rounded(result.data) if result.data.dtype == np.float32 else result

    return computed


def _of_wide_operands(dot: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `create_dot`: operands in bfloat16 are numbers."""

    @wraps(dot)
    def product(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *others)

    return product


def _over_numbers(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Replaces `apply` of a reduction or a scan: of numbers in bfloat16, rounded at the end."""
    core: Any = importlib.import_module("triton.language.core")

    def as_dtype(tensor: Any, handle: Any) -> Any:
        dtype = handle.dtype
        return core.tensor(handle, core.block_type(dtype, tensor.type.shape) if tensor.type.is_block() else dtype)

    @wraps(apply)
    def reduced(self: Any, given: Any) -> Any:
        if not isinstance(given, tuple):
            return reduced(self, (given,))[0]
        narrow = [one.dtype.name == "bf16" for one in given]
        wide = (as_dtype(one, _widened(one.handle)) for one in given)
        results = apply(self, tuple(wide)) if any(narrow) else apply(self, given)
        return tuple(
            as_dtype(one, _rounded(one.handle.data)) if was and one.dtype.name == "fp32" else one
            for one, was in zip(results, narrow, strict=False)
        )

    return reduced


def _to_bfloat16(cast: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Replaces `cast_impl`, which takes other numbers than float32 for the bits of bfloat16."""

    @wraps(cast)
    def converted(self: Any, source: Any, target: Any) -> Any:
        names = source.dtype.name, target.scalar.name
        if "bf16" not in names or "fp32" in names or names[0] == names[1]:
            return cast(self, source, target)
        wide = _widened(source)
        return _rounded(wide.data.astype(np.float32)) if names[1] == "bf16" else cast(self, wide, target)

    return converted


def _with_float32_scalars(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Replaces `_implicit_cvt`: a float becomes a float32 scalar, as in a compiled kernel."""
    language: Any = importlib.import_module("triton.language")

    @wraps(convert)
    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return language.tensor(_handle(np.array([argument], np.float32), "float32"), language.float32)

    return converted


def _left_to_tensors(method: Callable[[Any, Any], Any], tensor: type) -> Callable[[Any, Any], Any]:
    """Replaces an operator of `constexpr`: with a tensor on the right, the tensor's own operator computes."""

    @wraps(method)
    def operator(self: Any, other: Any) -> Any:
        return NotImplemented if isinstance(other, tensor) else method(self, other)

    return operator


def _call_libdevice(semantic: Any) -> None:
    """Give the functions of both modules named libdevice the interpreter, whoever has imported them already."""
    functions: Any = importlib.import_module("triton.language.extra.libdevice")
    of_cuda: Any = importlib.import_module("triton.language.extra.cuda.libdevice")
    for name, stub in vars(functions).items():
        if isfunction(stub) and hasattr(of_cuda, name):
            interpreted = partial(getattr(of_cuda, name), _semantic=semantic)
            stub.__code__, stub.__kwdefaults__ = _called.__code__, {"function": interpreted}
            setattr(of_cuda, name, interpreted)


def _called(*arguments: Any, function: Any) -> Any:
    return function(*arguments)


def _extern_elementwise(
    self: Any, library: str, path: str, symbol: str, arguments: list[Any], result_type: Any, pure: bool
) -> Any:
    """A function of libdevice, such as __nv_tanhf, of each element; its float32 results are rounded once."""
    name = symbol.removeprefix("__nv_")
    name = name if name in LIBDEVICE else name[:-1]
    if name not in LIBDEVICE:
        raise NotImplementedError(f"libdevice: {symbol} is not computed in the interpreter; judge it on a GPU")
    tensors = [torch.from_numpy(np.ascontiguousarray(one.data)) for one in arguments]
    wide = [one.double() if one.is_floating_point() else one for one in tensors]
    first = arguments[0]
    result = LIBDEVICE[name](*wide).numpy().reshape(first.data.shape)
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    return interpreter.TensorHandle(result.astype(interpreter._get_np_dtype(result_type.scalar)), result_type.scalar)
