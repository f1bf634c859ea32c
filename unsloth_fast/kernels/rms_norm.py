"""Root-mean-square normalisation.

    r = 1 / sqrt(mean(x^2) + eps)      n = x * r      y = (offset + weight) * n
    g = dy * (offset + weight)         dx = r * (g - n * mean(g * n))         dweight = sum over rows of dy * n

Saved: x, weight and r [rows] in float32. All arithmetic is float32; "llama" casting rounds n to x.dtype before the
products with the weight and with dy (in dweight). Bytes moved, for M x H elements of b bytes: 2MHb forward (x; y), 3MHb
backward (dy, x; dx). dweight is summed in a fixed order, without atomics: each program sums its block of rows into one
row of partial sums, and a second kernel adds these up (8 * programs * H bytes, most of them in L2).
"""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._launch import cdiv, check_runnable, kernel, launch, register, rows_of, tile
from unsloth_fast.kernels._norms import (
    backward_programs,
    backward_stages,
    backward_tile,
    column_sum_grid,
    column_sum_kernel,
    load_scale,
    load_tile,
    quotient,
    rounded,
    within,
)
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import checks
from unsloth_ref.types import Casting


@kernel(varying=("rows",), fixed=("columns",))
def rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, rows, columns, x_row, x_column, weight_stride, eps,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program. WHOLE: a tile holds whole rows; otherwise they are read twice, the second time from L2."""
    dtype = y_ptr.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    x = load_tile(x_ptr, row, column, rows, columns, x_row, x_column)
    squares = x * x
    if not WHOLE:
        for start in range(COLUMNS, columns, COLUMNS):
            x = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
            squares += x * x
    mean = quotient(tl.sum(squares, 1, keep_dims=True), columns)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, row < rows)
    if WHOLE:
        scale = load_scale(weight_ptr, column, columns, weight_stride, OFFSET)
        y = rounded(x * rstd, dtype, LLAMA) * scale
        tl.store(y_ptr + row * columns + column, y.to(dtype), (row < rows) & (column < columns))
    else:
        for start in range(0, columns, COLUMNS):
            x = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
            scale = load_scale(weight_ptr, start + column, columns, weight_stride, OFFSET)
            y = rounded(x * rstd, dtype, LLAMA) * scale
            tl.store(y_ptr + row * columns + start + column, y.to(dtype), (row < rows) & (start + column < columns))


@kernel(varying=("rows",), loops=("each",), fixed=("columns",))
def rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, columns, each, dy_row, dy_column, dsum_row, dsum_column, x_row, x_column, weight_stride,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, ADD: tl.constexpr, NEED_DX: tl.constexpr, NEED_DWEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Each program takes `each` * ROWS rows, a row as PARTS adjacent tiles; loads are pipelined.

    Programs take neighbouring rows at the same time. ADD: dsum is added to dx. EXACT: all tiles of a row are full;
    otherwise all but the last. HELD: the weight stays in registers.
    """
    dtype = x_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    scales = ()
    dweight = ()
    for part in tl.static_range(PARTS):
        dweight += (tl.zeros([1, COLUMNS], tl.float32),)
        if HELD:
            scales += (load_scale(weight_ptr, part * COLUMNS + column, columns, weight_stride, OFFSET),)
    for index in tl.range(0, each, num_stages=STAGES):
        row = ((index * tl.num_programs(0).to(tl.int64) + program) * ROWS + tl.arange(0, ROWS))[:, None]
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
        normed = ()
        gs = ()
        sums = ()
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.static_range(PARTS):
            at = part * COLUMNS + column
            dy = load_tile(dy_ptr, row, at, rows, columns, dy_row, dy_column, EXACT or part + 1 < PARTS)
            n = load_tile(x_ptr, row, at, rows, columns, x_row, x_column, EXACT or part + 1 < PARTS) * rstd
            if NEED_DWEIGHT:
                sums += (dweight[part] + tl.sum(dy * rounded(n, dtype, LLAMA), 0, keep_dims=True),)
            g = dy * (scales[part] if HELD else load_scale(weight_ptr, at, columns, weight_stride, OFFSET))
            normed += (n,)
            gs += (g,)
            products += g * n
        if NEED_DWEIGHT:
            dweight = sums
        if NEED_DX:
            mean = quotient(tl.sum(products, 1, keep_dims=True), columns)
            for part in tl.static_range(PARTS):
                at = part * COLUMNS + column
                dx = rstd * (gs[part] - normed[part] * mean)
                if ADD:
                    dx += load_tile(dsum_ptr, row, at, rows, columns, dsum_row, dsum_column, EXACT or part + 1 < PARTS)
                inside = within(row, at, rows, columns, EXACT or part + 1 < PARTS)
                tl.store(dx_ptr + row * columns + at, dx.to(dtype), inside)
    if NEED_DWEIGHT:
        for part in tl.static_range(PARTS):
            at = part * COLUMNS + column
            tl.store(partial_ptr + program * columns + at, dweight[part], at < columns)


@kernel(varying=("rows",), loops=("each",), fixed=("columns",))
def rms_norm_backward_long_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, columns, each, dy_row, dy_column, dsum_row, dsum_column, x_row, x_column, weight_stride,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, ADD: tl.constexpr, NEED_DX: tl.constexpr, NEED_DWEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Longer rows, one at a time in two passes; each program has its own row of partial sums in memory."""
    dtype = x_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    for index in range(0, each):
        row = (program * each + index + tl.arange(0, 1))[:, None]
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
        products = tl.zeros([1, COLUMNS], tl.float32)
        if NEED_DX:
            for start in range(0, columns, COLUMNS):
                dy = load_tile(dy_ptr, row, start + column, rows, columns, dy_row, dy_column)
                x = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
                products += dy * load_scale(weight_ptr, start + column, columns, weight_stride, OFFSET) * (x * rstd)
        mean = quotient(tl.sum(products, 1, keep_dims=True), columns)
        for start in range(0, columns, COLUMNS):
            inside = start + column < columns
            dy = load_tile(dy_ptr, row, start + column, rows, columns, dy_row, dy_column)
            normed = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column) * rstd
            if NEED_DX:
                g = dy * load_scale(weight_ptr, start + column, columns, weight_stride, OFFSET)
                dx = rstd * (g - normed * mean)
                if ADD:
                    dx += load_tile(dsum_ptr, row, start + column, rows, columns, dsum_row, dsum_column)
                tl.store(dx_ptr + row * columns + start + column, dx.to(dtype), inside & (row < rows))
            if NEED_DWEIGHT:
                partial = partial_ptr + program * columns + start + column
                before = tl.load(partial, inside & (row > program * each), other=0.0)
                tl.store(partial, before + dy * rounded(normed, dtype, LLAMA), inside)
        tl.debug_barrier()  # the next row reads the partial sums that this one wrote


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float, llama: bool) -> tuple[Tensor, Tensor]:
    """Compute y and r, new and contiguous."""
    y, rstd = rms_norm_forward_outputs(x, weight, eps, offset, llama)
    if x.numel() == 0:
        return y, rstd
    x = rows_of(x)
    rows, columns = x.shape
    # On an H200, 8192 rows of 4096 columns take 35.2 us with 8 warps and 36.4 with 4; with fewer columns 4 are faster.
    shape = tile(columns, elements=2048, widest=16384, per_thread=16 if columns == 4096 else 32)
    launch(
        rms_norm_forward_kernel, cdiv(rows, shape.rows), x,
        x, weight, y, rstd, rows, columns, *x.stride(), *weight.stride(), eps,
        OFFSET=offset, LLAMA=llama, ROWS=shape.rows, COLUMNS=shape.columns, WHOLE=columns <= shape.columns,
        num_warps=shape.warps,
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    offset: float, llama: bool, need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute dx, to which dsum is added, and dweight, new and contiguous; one that is not needed has no elements."""
    dx, dweight = rms_norm_backward_outputs(dy, dsum, x, weight, rstd, offset, llama, need_dx, need_dweight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    add = dsum is not None
    dy, x, dsum = rows_of(dy), rows_of(x), rows_of(dsum if add else dy)
    rows, columns = x.shape
    shape = backward_tile(columns, 16384)
    each, programs = backward_programs(shape, cdiv(rows, shape.rows), need_dweight)
    partial = x.new_empty((programs, columns) if need_dweight else 0, dtype=torch.float32)
    strides = (*dy.stride(), *dsum.stride(), *x.stride(), *weight.stride())
    arguments = (dy, dsum, x, weight, rstd, dx, partial, rows, columns, each, *strides)
    flags: dict[str, float] = {"OFFSET": offset, "LLAMA": llama, "ADD": add}
    flags |= {"NEED_DX": need_dx, "NEED_DWEIGHT": need_dweight, "COLUMNS": shape.columns, "num_warps": shape.warps}
    if shape.parts:
        held = columns <= 8192
        # A program that sums nothing up has a single tile: there is no next one to load.
        stages = backward_stages(shape, 2 + add + (not held), x) if need_dweight else 1
        exact = columns == shape.parts * shape.columns
        flags |= {"ROWS": shape.rows, "PARTS": shape.parts, "EXACT": exact, "STAGES": stages, "HELD": held}
        launch(rms_norm_backward_kernel, programs, x, *arguments, **flags)
    else:
        launch(rms_norm_backward_long_kernel, programs, x, *arguments, **flags)
    if need_dweight:
        blocks, options = column_sum_grid(programs, columns)
        launch(column_sum_kernel, blocks, x, partial, dweight, programs, columns, **options)
    return dx, dweight


def rms_norm_forward_outputs(
    x: Tensor, weight: Tensor, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor]:
    """Allocate y and r."""
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def rms_norm_backward_outputs(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    offset: float, llama: bool, need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate dx and dweight."""
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(weight.shape if need_dweight else 0)


forward_op = register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, float offset, bool llama) -> (Tensor, Tensor)",
    rms_norm_forward,
    rms_norm_forward_outputs,
)
backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, float offset, bool llama, "
    "bool need_dx, bool need_dweight) -> (Tensor, Tensor)",
    rms_norm_backward,
    rms_norm_backward_outputs,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting) -> Tensor:
        llama = casting == "llama"
        y, rstd = forward_op(x, weight, eps, offset, llama)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.llama = offset, llama
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        dx, dweight = backward_op(dy, None, x, weight, rstd, ctx.offset, ctx.llama, need_dx, need_dweight)
        return dx if need_dx else None, dweight if need_dweight else None, None, None, None


def check(x: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting) -> None:
    """Raise for arguments that rms_norm does not allow."""
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    check_runnable("x", x)
    check_runnable("weight", weight)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """Scale each row of x to a root mean square of 1, then multiply it by the weight.

    Args:
        x: [..., H], float16, bfloat16 or float32; computed in float32.
        weight: [H], float16, bfloat16 or float32.
        eps: added to the mean square; not negative.
        offset: added to the weight; 1.0 for Gemma, which stores weight - 1.
        casting: "llama" rounds the normalised row to x.dtype before the product, "gemma" rounds once, at the end.

    Returns:
        [..., H] in x.dtype, contiguous.

    Raises:
        ValueError: weight is not [H] on the device of x, eps is negative, or casting is unknown.
        TypeError: x or weight does not have a float dtype, or is float64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467. Rounding: transformers' LlamaRMSNorm and GemmaRMSNorm.
    """
    return call_recorded(_RMSNorm, check, x, weight, eps, offset, casting)
