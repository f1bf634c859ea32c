"""Float8 numbers in blocks, times their scales.

    x = values * scale

The product is float32, rounded once. The kernel is in `_fp8.py`. Bytes moved, for n elements of b bytes: n (1 + b), and
4 for each scale.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._fp8 import fp8_dequantize_kernel
from unsloth_fast.kernels._launch import cdiv, check_dtype, check_runnable, launch, register
from unsloth_ref import float8_checks
from unsloth_ref.float8_checks import BLOCK, blocks

ROWS = 32  # of a tile; they divide those of a block


def fp8_dequantize_forward(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute x from bytes, new and contiguous."""
    x = fp8_dequantize_forward_outputs(numbers, scale, dtype)
    if x.numel():
        rows, columns = numbers.shape
        launch(
            fp8_dequantize_kernel, cdiv(rows, ROWS) * scale.shape[1], numbers,
            numbers, scale, x, rows, columns, scale.shape[1], *numbers.stride(), *scale.stride(),
            WHOLE=len(scale) == blocks(rows), ROWS=ROWS, COLUMNS=BLOCK, num_warps=4,
        )  # fmt: skip
    return x


def fp8_dequantize_forward_outputs(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate x."""
    return numbers.new_empty(numbers.shape, dtype=dtype)


forward_op = register(
    "fp8_dequantize_forward(Tensor numbers, Tensor scale, ScalarType dtype) -> Tensor",
    fp8_dequantize_forward,
    fp8_dequantize_forward_outputs,
)


def fp8_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a float8 matrix with a scale per block back to a wider dtype. The result is a constant.

    Args:
        values: [O, I], torch.float8_e4m3fn.
        scale: [ceil(O / 128), ceil(I / 128)] or [O, ceil(I / 128)], float32, as `fp8_quantize` returns it.
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        [O, I], contiguous.

    Raises:
        ValueError: shapes or devices do not match, or scale requires a gradient.
        TypeError: values are not e4m3, scale is not float32, or dtype is no float dtype or float64.
        RuntimeError: on a CPU without Triton's interpreter.

    Sources: those of `fp8_quantize`.
    """
    float8_checks.dequantize_arguments(values, scale, dtype)
    check_dtype("dtype", dtype)
    check_runnable("values", values)
    return forward_op(values.detach().view(torch.uint8), scale.detach().resolve_neg(), dtype)
