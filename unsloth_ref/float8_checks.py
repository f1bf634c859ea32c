"""Argument checks of operations on float8 numbers in blocks, which both backends call."""

import torch
from torch import Tensor

from unsloth_ref import checks

FLOAT8 = torch.float8_e4m3fn
BLOCK = 128  # columns of a block, and rows of a block of a weight


def blocks(size: int, block: int = BLOCK) -> int:
    """How many blocks so many rows or columns take; the last one may be shorter."""
    return -(-size // block)


def quantize_arguments(x: Tensor, block_rows: int) -> None:
    """Check a float matrix and the rows of a block."""
    checks.dimensions("x", x, 2, "[O, I]")
    checks.dtype("x", x)
    checks.one_of("block_rows", block_rows, (1, BLOCK))


def dequantize_arguments(values: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Check float8 numbers [O, I], the scales of their blocks of 1 or 128 rows, and a float dtype."""
    checks.dimensions("values", values, 2, "[O, I]")
    checks.dtype("values", values, (FLOAT8,))
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: {', '.join(map(str, checks.FLOATS))}")
    rows, columns = values.shape
    shapes = [(blocks(rows), blocks(columns)), (rows, blocks(columns))]
    if tuple(scale.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"scale: got shape {list(scale.shape)}; allowed: {allowed}, one entry per block of 128 or of 1 row and 128 "
            "columns of values"
        )
    _scale(scale, dtype, "values", values)


def linear_arguments(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Check x [..., I], weight [O, I] in float8, the scales of its blocks, and bias [O] of a linear layer."""
    checks.has_rows("x", x)
    checks.dtype("x", x)
    checks.dimensions("weight", weight, 2, "[O, I]")
    checks.shape("weight", weight, (weight.shape[0], x.shape[-1]), "[O, I], the last dimension of x")
    weight_arguments(x, weight, scale)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1], "one entry per row of weight")
        checks.dtype("bias", bias, (x.dtype,))
        checks.same_device("bias", bias, "x", x)


def weight_arguments(x: Tensor, weight: Tensor, scale: Tensor, which: str = "") -> None:
    """Check the dtype and device of a matrix in float8, and the scales of its blocks; messages add `which` to names."""
    checks.dtype(f"weight{which}", weight, (FLOAT8,))
    checks.same_device(f"weight{which}", weight, "x", x)
    shape = blocks(weight.shape[0]), blocks(weight.shape[1])
    checks.shape(f"scale{which}", scale, shape, f"one entry per block of 128 x 128 of weight{which}")
    _scale(scale, x.dtype, "x", x, which)
    _constant(f"weight{which}", weight)


def _scale(scale: Tensor, dtype: torch.dtype, other_name: str, other: Tensor, which: str = "") -> None:
    """Check that scales are constants on a device: float32, or float64 where a result is."""
    name, wide = f"scale{which}", torch.promote_types(dtype, torch.float32)
    checks.dtype(name, scale, list(dict.fromkeys((torch.float32, wide))))
    checks.same_device(name, scale, other_name, other)
    _constant(name, scale)


def _constant(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that requires a gradient, where gradients are recorded."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: got a tensor that requires a gradient; allowed: a constant; detach() makes one")
