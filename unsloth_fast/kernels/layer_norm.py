"""Layer normalisation.

    m = mean(x)      r = 1 / sqrt(mean((x - m)^2) + eps)      n = (x - m) * r      y = weight * n + bias
    g = dy * weight      dx = r * (g - mean(g) - n * mean(g * n))
    dweight = sum over rows of dy * n      dbias = sum over rows of dy

Saved: x, weight, and m and r as one [2, rows] in float32. All arithmetic is float32, rounded once at each store; the
variance is the mean of (x - m)^2, never a difference of means. Bytes moved, for M x H elements of b bytes: 2MHb forward
(x; y), 3MHb backward (dy, x; dx). dweight and dbias are summed in a fixed order, like rms_norm's dweight.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._launch import (
    Tile,
    cdiv,
    check_runnable,
    launch,
    next_power_of_2,
    register,
    rows_of,
)
from unsloth_fast.kernels._layer_norm import (
    layer_norm_backward_kernel,
    layer_norm_backward_long_kernel,
    layer_norm_forward_kernel,
    layer_norm_forward_long_kernel,
    layer_norm_sums_kernel,
)
from unsloth_fast.kernels._norms import backward_programs, backward_stages, backward_tile, column_sum_grid
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import checks


def forward_tile(columns: int) -> Tile:
    """One of the adjacent tiles of a row; several short rows share one.

    On an H200, rows of 2560 or 5120 columns took 1.15 or 1.2 times as long in a single tile of 4096 or 8192: three of
    eight threads were idle, and instructions take most of the time.
    """
    widest = 512 if columns <= 3072 else 1024 if columns <= 6144 else 2048
    width = next_power_of_2(columns)
    return Tile(max(1, 2048 // width), min(width, widest), widest // 256)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute y, and m and r as one tensor; new and contiguous."""
    y, stats = layer_norm_forward_outputs(x, weight, bias, eps)
    if x.numel() == 0:
        return y, stats
    x = rows_of(x)
    rows, columns = x.shape
    shape = forward_tile(columns)
    parts = cdiv(columns, shape.columns)
    arguments = (x, weight, bias, y, stats, rows, columns, *x.stride(), *weight.stride(), *bias.stride(), eps)
    if parts <= 8:
        launch(
            layer_norm_forward_kernel, cdiv(rows, shape.rows), x, *arguments,
            ROWS=shape.rows, COLUMNS=shape.columns, PARTS=parts, EXACT=columns % shape.columns == 0,
            num_warps=shape.warps,
        )  # fmt: skip
    else:
        launch(layer_norm_forward_long_kernel, rows, x, *arguments, COLUMNS=16384, num_warps=8)
    return y, stats


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, need_dx: bool, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx, dweight and dbias, new and contiguous; those that are not needed have no elements."""
    dx, dweight, dbias = layer_norm_backward_outputs(dy, x, weight, bias, stats, need_dx, need_sums)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    dy, x = rows_of(dy), rows_of(x)
    rows, columns = x.shape
    shape = backward_tile(columns, 8192)  # the two sums leave no registers for more columns
    # With a wide tile, a processor holds one program: only the pipeline over several tiles hides its loads.
    each, programs = backward_programs(shape, cdiv(rows, shape.rows), need_sums or columns > 4096)
    partial = x.new_empty((programs, 2, columns) if need_sums else 0, dtype=torch.float32)
    strides = (*dy.stride(), *x.stride(), *weight.stride())
    arguments = (dy, x, weight, stats, dx, partial, rows, columns, each, *strides)
    flags: dict[str, int] = {"NEED_DX": need_dx, "NEED_SUMS": need_sums}
    flags |= {"COLUMNS": shape.columns, "num_warps": shape.warps}
    if shape.parts:
        stages = backward_stages(shape, 2, x) if each > 1 else 1  # a single tile has no next one
        exact = columns == shape.parts * shape.columns
        flags |= {"ROWS": shape.rows, "PARTS": shape.parts, "EXACT": exact, "STAGES": stages}
        launch(layer_norm_backward_kernel, programs, x, *arguments, **flags)
    else:
        launch(layer_norm_backward_long_kernel, programs, x, *arguments, **flags)
    if need_sums:
        blocks, options = column_sum_grid(programs, columns)
        launch(layer_norm_sums_kernel, 2 * blocks, x, partial, dweight, dbias, programs, columns, **options)
    return dx, dweight, dbias


def layer_norm_forward_outputs(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Allocate y, and m and r."""
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)


def layer_norm_backward_outputs(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, need_dx: bool, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate dx, dweight and dbias."""
    sums = weight.shape if need_sums else 0
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(sums), bias.new_empty(sums)


forward_op = register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_forward,
    layer_norm_forward_outputs,
)
backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats, bool need_dx, bool need_sums)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_backward,
    layer_norm_backward_outputs,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, stats = forward_op(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor
    ) -> tuple[Tensor | None, ...]:
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        dx, dweight, dbias = backward_op(dy, x, weight, bias, stats, need_dx, need_dweight or need_dbias)
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None


def check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raise for arguments that layer_norm does not allow."""
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_runnable(name, tensor)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Shift each row of x to mean 0 and scale it to variance 1, then apply the weight and the bias.

    Args:
        x: [..., H], float16, bfloat16 or float32; computed in float32.
        weight: [H], float16, bfloat16 or float32.
        bias: [H], float16, bfloat16 or float32.
        eps: added to the variance, the mean of the squared deviations; not negative.

    Returns:
        [..., H] in x.dtype, contiguous.

    Raises:
        ValueError: weight or bias is not [H] on the device of x, or eps is negative.
        TypeError: x, weight or bias does not have a float dtype, or is float64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450. Rounding: torch.nn.LayerNorm's.
    """
    return call_recorded(_LayerNorm, check, x, weight, bias, eps)
