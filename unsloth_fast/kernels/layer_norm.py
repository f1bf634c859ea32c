"""Layer normalisation.

    m = mean(x)      r = 1 / sqrt(mean((x - m)^2) + eps)      n = (x - m) * r      y = weight * n + bias
    g = dy * weight      dx = r * (g - mean(g) - n * mean(g * n))
    dweight = sum over rows of dy * n      dbias = sum over rows of dy

Saved: x, weight, and m and r as one [2, rows] in float32. All arithmetic is float32, rounded once at each store; the
variance is a mean of squares around m, never a difference. Bytes moved, for M x H elements of b bytes: 2MHb forward (x;
y), 3MHb backward (dy, x; dx). dweight and dbias are summed in a fixed order, as rms_norm's dweight.
"""

# What only REST defines, only it uses:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import COUNTS, cdiv, check_runnable, first_order, launch, register, rows_of, tile
from unsloth_fast.kernels._norms import (
    backward_programs,
    backward_stages,
    backward_tile,
    column_sum,
    load_tile,
    quotient,
    summing,
)
from unsloth_fast.kernels._replay import apply
from unsloth_ref import checks


@triton.jit
def load_vector(pointer, column, columns, stride):
    """One row [1, COLUMNS] in float32, 0 beyond its end."""
    return tl.load(pointer + column * stride, column < columns, other=0.0).to(tl.float32)


@triton.jit
def centred(x, mean, row, column, rows, columns):
    """x - mean, 0 outside the matrix."""
    return tl.where((row < rows) & (column < columns), x - mean, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr,
    rows, columns, x_row, x_column, weight_stride, bias_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; WHOLE: a tile holds whole rows, otherwise they are read three times, twice from L2."""
    dtype = y_ptr.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    x = load_tile(x_ptr, row, column, rows, columns, x_row, x_column)
    sums = x
    if not WHOLE:
        for start in range(COLUMNS, columns, COLUMNS):
            sums += load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
    mean = quotient(tl.sum(sums, 1, keep_dims=True), columns)
    x = centred(x, mean, row, column, rows, columns)
    squares = x * x
    if not WHOLE:
        for start in range(COLUMNS, columns, COLUMNS):
            part = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
            part = centred(part, mean, row, start + column, rows, columns)
            squares += part * part
    variance = quotient(tl.sum(squares, 1, keep_dims=True), columns)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(stats_ptr + row, mean, row < rows)
    tl.store(stats_ptr + rows + row, rstd, row < rows)
    if WHOLE:
        weight = load_vector(weight_ptr, column, columns, weight_stride)
        y = x * rstd * weight + load_vector(bias_ptr, column, columns, bias_stride)
        tl.store(y_ptr + row * columns + column, y.to(dtype), (row < rows) & (column < columns))
    else:
        for start in range(0, columns, COLUMNS):
            normed = (load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column) - mean) * rstd
            weight = load_vector(weight_ptr, start + column, columns, weight_stride)
            y = normed * weight + load_vector(bias_ptr, start + column, columns, bias_stride)
            tl.store(y_ptr + row * columns + start + column, y.to(dtype), (row < rows) & (start + column < columns))


@triton.jit
def store_dx(dx_ptr, g, normed, shift, slope, rstd, row, column, rows, columns):
    """A tile of dx."""
    dx = rstd * (g - shift - normed * slope)
    inside = (row < rows) & (column < columns)
    tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["each"])
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, partial_ptr,
    rows, columns, each, dy_row, dy_column, x_row, x_column, weight_stride,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows that fit a tile: `each` consecutive tiles a program, the loads of the next ones in flight under this one."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    weight = load_vector(weight_ptr, column, columns, weight_stride)
    dweight = tl.zeros([1, COLUMNS], tl.float32)
    dbias = tl.zeros([1, COLUMNS], tl.float32)
    if REST:
        column_2 = COLUMNS + tl.arange(0, REST).to(tl.int64)[None, :]
        weight_2 = load_vector(weight_ptr, column_2, columns, weight_stride)
        dweight_2 = tl.zeros([1, REST], tl.float32)
        dbias_2 = tl.zeros([1, REST], tl.float32)
    for index in tl.range(0, each, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = ((program * each + index) * ROWS + tl.arange(0, ROWS))[:, None]
        dy = load_tile(dy_ptr, row, column, rows, columns, dy_row, dy_column)
        x = load_tile(x_ptr, row, column, rows, columns, x_row, x_column)
        mean = tl.load(stats_ptr + row, row < rows, other=0.0)
        rstd = tl.load(stats_ptr + rows + row, row < rows, other=0.0)
        normed = (x - mean) * rstd  # outside the matrix it meets only zeros of dy
        if REST:
            dy_2 = load_tile(dy_ptr, row, column_2, rows, columns, dy_row, dy_column)
            normed_2 = (load_tile(x_ptr, row, column_2, rows, columns, x_row, x_column) - mean) * rstd
        if NEED_SUMS:  # before dx, so that dy need not outlive the sums over the row
            dweight += tl.sum(dy * normed, 0, keep_dims=True)
            dbias += tl.sum(dy, 0, keep_dims=True)
            if REST:
                dweight_2 += tl.sum(dy_2 * normed_2, 0, keep_dims=True)
                dbias_2 += tl.sum(dy_2, 0, keep_dims=True)
        if NEED_DX:
            g = dy * weight
            sums, products = tl.sum(g, 1, keep_dims=True), tl.sum(g * normed, 1, keep_dims=True)
            if REST:
                g_2 = dy_2 * weight_2
                sums += tl.sum(g_2, 1, keep_dims=True)
                products += tl.sum(g_2 * normed_2, 1, keep_dims=True)
            shift, slope = quotient(sums, columns), quotient(products, columns)
            store_dx(dx_ptr, g, normed, shift, slope, rstd, row, column, rows, columns)
            if REST:
                store_dx(dx_ptr, g_2, normed_2, shift, slope, rstd, row, column_2, rows, columns)
    if NEED_SUMS:
        partial_ptr += 2 * program * columns
        tl.store(partial_ptr + column, dweight, column < columns)
        tl.store(partial_ptr + columns + column, dbias, column < columns)
        if REST:
            tl.store(partial_ptr + column_2, dweight_2, column_2 < columns)
            tl.store(partial_ptr + columns + column_2, dbias_2, column_2 < columns)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["each"])
def layer_norm_backward_long_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, partial_ptr,
    rows, columns, each, dy_row, dy_column, x_row, x_column, weight_stride,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Longer rows, one at a time in two passes; the program's two rows of partial sums are kept in memory."""
    dtype = x_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    for index in range(0, each):
        row = (program * each + index + tl.arange(0, 1))[:, None]
        mean = tl.load(stats_ptr + row, row < rows, other=0.0)
        rstd = tl.load(stats_ptr + rows + row, row < rows, other=0.0)
        sums = tl.zeros([1, COLUMNS], tl.float32)
        products = tl.zeros([1, COLUMNS], tl.float32)
        if NEED_DX:
            for start in range(0, columns, COLUMNS):
                dy = load_tile(dy_ptr, row, start + column, rows, columns, dy_row, dy_column)
                x = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
                g = dy * load_vector(weight_ptr, start + column, columns, weight_stride)
                sums += g
                products += g * ((x - mean) * rstd)
        shift = quotient(tl.sum(sums, 1, keep_dims=True), columns)
        slope = quotient(tl.sum(products, 1, keep_dims=True), columns)
        for start in range(0, columns, COLUMNS):
            inside = start + column < columns
            dy = load_tile(dy_ptr, row, start + column, rows, columns, dy_row, dy_column)
            normed = (load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column) - mean) * rstd
            if NEED_DX:
                g = dy * load_vector(weight_ptr, start + column, columns, weight_stride)
                dx = rstd * (g - shift - normed * slope)
                tl.store(dx_ptr + row * columns + start + column, dx.to(dtype), inside & (row < rows))
            if NEED_SUMS:
                earlier = inside & (row > program * each)
                partial = partial_ptr + 2 * program * columns + start + column
                before = tl.load(partial, earlier, other=0.0)
                tl.store(partial, before + dy * normed, inside)
                before = tl.load(partial + columns, earlier, other=0.0)
                tl.store(partial + columns, before + dy, inside)
        tl.debug_barrier()  # the next row reads the partial sums that this one wrote


@triton.jit(do_not_specialize=COUNTS)
def layer_norm_sums_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A block of columns a program: of dweight in the even ones, of dbias in the odd ones."""
    block = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        column_sum(partial_ptr, dweight_ptr, block, rows, columns, 2 * columns, ROWS, COLUMNS)
    else:
        column_sum(partial_ptr + columns, dbias_ptr, block, rows, columns, 2 * columns, ROWS, COLUMNS)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and m and r as one tensor; new and contiguous."""
    y, stats = layer_norm_forward_fake(x, weight, bias, eps)
    if x.numel() == 0:
        return y, stats
    x = rows_of(x)
    rows, columns = x.shape
    # Of rows above 8192 columns 16 warps would fill a processor: while one waits for its sums nothing is loaded.
    shape = tile(columns, elements=2048, widest=16384, per_thread=32 if columns <= 8192 else 64)
    launch(
        layer_norm_forward_kernel, cdiv(rows, shape.rows), x,
        x, weight, bias, y, stats, rows, columns, *x.stride(), *weight.stride(), *bias.stride(), eps,
        ROWS=shape.rows, COLUMNS=shape.columns, WHOLE=columns <= shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return y, stats


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, need_dx: bool, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, new and contiguous; those that are not needed are empty."""
    dx, dweight, dbias = layer_norm_backward_fake(dy, x, weight, bias, stats, need_dx, need_sums)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    dy, x = rows_of(dy), rows_of(x)
    rows, columns = x.shape
    shape = backward_tile(columns, 8192)  # its two sums leave no registers for more
    # A wide tile leaves room for one program on a processor: only the pipeline of several tiles hides its loads.
    each, programs = backward_programs(shape, cdiv(rows, shape.rows), need_sums or columns > 4096)
    partial = x.new_empty((programs, 2, columns) if need_sums else 0, dtype=torch.float32)
    strides = (*dy.stride(), *x.stride(), *weight.stride())
    arguments = (dy, x, weight, stats, dx, partial, rows, columns, each, *strides)
    flags: dict[str, Any] = {"NEED_DX": need_dx, "NEED_SUMS": need_sums}
    flags |= {"COLUMNS": shape.columns, "num_warps": shape.warps}
    if columns <= shape.columns + shape.rest:
        stages = backward_stages(shape, 2, x) if each > 1 else 1  # a single tile has no next one
        flags |= {"ROWS": shape.rows, "REST": shape.rest, "STAGES": stages}
        launch(layer_norm_backward_kernel, programs, x, *arguments, **flags)
    else:
        launch(layer_norm_backward_long_kernel, programs, x, *arguments, **flags)
    if need_sums:
        sums, options = summing(programs, columns)
        launch(layer_norm_sums_kernel, 2 * sums, x, partial, dweight, dbias, programs, columns, **options)
    return dx, dweight, dbias


def layer_norm_forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and m and r, unfilled."""
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)


def layer_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, need_dx: bool, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, unfilled."""
    sums = weight.shape if need_sums else 0
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(sums), bias.new_empty(sums)


forward_op = register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_forward,
    layer_norm_forward_fake,
)
backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats, bool need_dx, bool need_sums)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_backward,
    layer_norm_backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, stats = forward_op(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, stats)
        return y

    @staticmethod
    @first_order
    def backward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor
    ) -> tuple[Tensor | None, ...]:
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        dx, dweight, dbias = backward_op(dy, x, weight, bias, stats, need_dx, need_dweight or need_dbias)
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None


def check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raise what layer_norm raises."""
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_runnable(name, tensor)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Shift each row of x to mean 0, scale it to variance 1, then apply the weight and the bias.

    Args:
        x: [..., H], float16, bfloat16 or float32; computed in float32.
        weight: [H], float16, bfloat16 or float32.
        bias: [H], float16, bfloat16 or float32.
        eps: added to the variance, that of a population (the mean of the squares); not negative.

    Returns:
        [..., H] in x.dtype, contiguous.

    Raises:
        ValueError: weight or bias is not one row of x or on another device, or eps is negative.
        TypeError: x, weight or bias is not of a float dtype, or is float64.
        RuntimeError: on a CPU without Triton's interpreter, and on a second backward through the gradients.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450. Rounding: torch.nn.LayerNorm's.
    """
    return apply(_LayerNorm, check, x, weight, bias, eps)
