"""The square of ReLU.

    p = max(x, 0)      y = p^2      dx = 2 * dy * p

Tiles are those of `_gated.py`. Saved: x. All arithmetic is float32, with one rounding at each store. Bytes moved, for
M x F elements of b bytes: 2MFb forward (x; y), 3MFb backward (dy, x; dx).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._gated import as_matrices, tile_indices, tiling
from unsloth_fast.kernels._launch import check_runnable, kernel, launch, register
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import checks


@triton.jit
def positive_part(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@kernel(varying=("rows", "tiles_per_row"), fixed=("columns",))
def relu_squared_forward_kernel(
    x_ptr, y_ptr, rows, columns, tiles_per_row, x_row, x_column,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y for one tile."""
    row, column = tile_indices(tiles_per_row, FLAT, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    x = positive_part(tl.load(x_ptr + row * x_row + column * x_column, inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + row * columns + column, (x * x).to(y_ptr.dtype.element_ty), inside)


@kernel(varying=("rows", "tiles_per_row"), fixed=("columns",))
def relu_squared_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, rows, columns, tiles_per_row, dy_row, dy_column, x_row, x_column,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx for one tile."""
    row, column = tile_indices(tiles_per_row, FLAT, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    dy = tl.load(dy_ptr + row * dy_row + column * dy_column, inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_row + column * x_column, inside, other=0.0).to(tl.float32)
    dx = 2.0 * dy * positive_part(x)
    tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), inside)


def relu_squared_forward(x: Tensor) -> Tensor:
    """Compute y, new and contiguous."""
    y = relu_squared_forward_outputs(x)
    if x.numel() == 0:
        return y
    (x,) = as_matrices(x)
    options, tiles_per_row, programs = tiling(x)
    launch(relu_squared_forward_kernel, programs, x, x, y, *x.shape, tiles_per_row, *x.stride(), **options)
    return y


def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Compute dx, new and contiguous."""
    dx = relu_squared_backward_outputs(dy, x)
    if x.numel() == 0:
        return dx
    dy, x = as_matrices(dy, x)
    options, tiles_per_row, programs = tiling(x)
    strides = (*dy.stride(), *x.stride())
    launch(relu_squared_backward_kernel, programs, x, dy, x, dx, *x.shape, tiles_per_row, *strides, **options)
    return dx


def relu_squared_forward_outputs(x: Tensor) -> Tensor:
    """Allocate y."""
    return x.new_empty(x.shape)


def relu_squared_backward_outputs(dy: Tensor, x: Tensor) -> Tensor:
    """Allocate dx."""
    return x.new_empty(x.shape)


forward_op = register("relu_squared_forward(Tensor x) -> Tensor", relu_squared_forward, relu_squared_forward_outputs)
backward_op = register(
    "relu_squared_backward(Tensor dy, Tensor x) -> Tensor", relu_squared_backward, relu_squared_backward_outputs
)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return forward_op(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        return (backward_op(dy, x),)


def check(x: Tensor) -> None:
    """Raise for arguments that relu_squared does not allow."""
    checks.has_rows("x", x)
    checks.dtype("x", x)
    check_runnable("x", x)


def relu_squared(x: Tensor) -> Tensor:
    """Square the positive elements and replace all others by 0.

    Args:
        x: [..., F], float16, bfloat16 or float32.

    Returns:
        [..., F] in x.dtype, contiguous.

    Raises:
        ValueError: x has no dimension.
        TypeError: x does not have a float dtype or is float64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: So et al. 2021, arXiv:2109.08668. Rounding: as transformers' ReLUSquaredActivation.
    """
    return call_recorded(_ReluSquared, check, x)
