"""The kernels of layer_norm; layer_norm.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._launch import kernel
from unsloth_fast.kernels._norms import column_sum, load_tile, quotient, within


@triton.jit
def load_vector(pointer, column, columns, stride, FULL: tl.constexpr):
    """Load one row [1, COLUMNS] in float32, 0 beyond its end."""
    if FULL:
        return tl.load(pointer + column * stride).to(tl.float32)
    else:
        return tl.load(pointer + column * stride, column < columns, other=0.0).to(tl.float32)


@triton.jit
def centred(x, mean, column, columns, FULL: tl.constexpr):
    """x - mean, 0 outside the matrix: x is 0 there, and so is the mean of a row outside."""
    return x - (mean if FULL else tl.where(column < columns, mean, 0.0))


@triton.jit
def store_stats(stats_ptr, mean, squares, eps, row, rows, columns):
    """Store mean and r; return r."""
    variance = quotient(tl.sum(squares, 1, keep_dims=True), columns)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(stats_ptr + row, mean, row < rows)
    tl.store(stats_ptr + rows + row, rstd, row < rows)
    return rstd


@triton.jit
def store_normed(
    y_ptr, x, mean, rstd, weight_ptr, bias_ptr, row, column, rows, columns, weight_stride, bias_stride,
    FULL: tl.constexpr,
):  # fmt: skip
    """Compute and store a tile of y."""
    weight = load_vector(weight_ptr, column, columns, weight_stride, FULL)
    bias = load_vector(bias_ptr, column, columns, bias_stride, FULL)
    y = (x - mean) * rstd * weight + bias
    inside = within(row, column, rows, columns, FULL)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), inside)


@kernel(varying=("rows",), fixed=("columns",))
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr,
    rows, columns, x_row, x_column, weight_stride, bias_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, as PARTS adjacent tiles. EXACT: all tiles are full; otherwise all but the last."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    xs = ()
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        x = load_tile(x_ptr, row, at, rows, columns, x_row, x_column, EXACT or part + 1 < PARTS)
        xs += (x,)
        sums += x
    mean = quotient(tl.sum(sums, 1, keep_dims=True), columns)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        deviation = centred(xs[part], mean, at, columns, EXACT or part + 1 < PARTS)
        squares += deviation * deviation
    rstd = store_stats(stats_ptr, mean, squares, eps, row, rows, columns)
    for part in tl.static_range(PARTS):
        store_normed(
            y_ptr, xs[part], mean, rstd, weight_ptr, bias_ptr, row, part * COLUMNS + column, rows, columns,
            weight_stride, bias_stride, EXACT or part + 1 < PARTS,
        )  # fmt: skip


@kernel(varying=("rows",), fixed=("columns",))
def layer_norm_forward_long_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr,
    rows, columns, x_row, x_column, weight_stride, bias_stride, eps,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One longer row per program, read three times, twice of them from L2."""
    row = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[:, None]
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    sums = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        sums += load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
    mean = quotient(tl.sum(sums, 1, keep_dims=True), columns)
    squares = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        x = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
        deviation = centred(x, mean, start + column, columns, False)
        squares += deviation * deviation
    rstd = store_stats(stats_ptr, mean, squares, eps, row, rows, columns)
    for start in range(0, columns, COLUMNS):
        x = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)
        store_normed(
            y_ptr, x, mean, rstd, weight_ptr, bias_ptr, row, start + column, rows, columns, weight_stride, bias_stride,
            False,
        )  # fmt: skip


@kernel(varying=("rows",), loops=("each",), fixed=("columns",))
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, partial_ptr,
    rows, columns, each, dy_row, dy_column, x_row, x_column, weight_stride,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes `each` * ROWS rows, a row as PARTS adjacent tiles; loads are pipelined.

    Programs take neighbouring rows at the same time. EXACT: all tiles of a row are full; otherwise all but the last.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    weights = ()
    dweight = ()
    dbias = ()
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        weights += (load_vector(weight_ptr, at, columns, weight_stride, EXACT or part + 1 < PARTS),)
        dweight += (tl.zeros([1, COLUMNS], tl.float32),)
        dbias += (tl.zeros([1, COLUMNS], tl.float32),)
    for index in tl.range(0, each, num_stages=STAGES):
        row = ((index * tl.num_programs(0).to(tl.int64) + program) * ROWS + tl.arange(0, ROWS))[:, None]
        mean = tl.load(stats_ptr + row, row < rows, other=0.0)
        rstd = tl.load(stats_ptr + rows + row, row < rows, other=0.0)
        normed = ()
        gs = ()
        dweight_sums = ()
        dbias_sums = ()
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.static_range(PARTS):
            at = part * COLUMNS + column
            dy = load_tile(dy_ptr, row, at, rows, columns, dy_row, dy_column, EXACT or part + 1 < PARTS)
            x = load_tile(x_ptr, row, at, rows, columns, x_row, x_column, EXACT or part + 1 < PARTS)
            n = (x - mean) * rstd  # outside the matrix it is multiplied by zeros of dy
            if NEED_SUMS:
                dweight_sums += (dweight[part] + tl.sum(dy * n, 0, keep_dims=True),)
                dbias_sums += (dbias[part] + tl.sum(dy, 0, keep_dims=True),)
            g = dy * weights[part]
            normed += (n,)
            gs += (g,)
            sums += g
            products += g * n
        if NEED_SUMS:
            dweight = dweight_sums
            dbias = dbias_sums
        if NEED_DX:
            shift = quotient(tl.sum(sums, 1, keep_dims=True), columns)
            slope = quotient(tl.sum(products, 1, keep_dims=True), columns)
            for part in tl.static_range(PARTS):
                at = part * COLUMNS + column
                dx = rstd * (gs[part] - shift - normed[part] * slope)
                inside = within(row, at, rows, columns, EXACT or part + 1 < PARTS)
                tl.store(dx_ptr + row * columns + at, dx.to(dx_ptr.dtype.element_ty), inside)
    if NEED_SUMS:
        for part in tl.static_range(PARTS):
            at = part * COLUMNS + column
            partial = partial_ptr + 2 * program * columns + at
            tl.store(partial, dweight[part], at < columns)
            tl.store(partial + columns, dbias[part], at < columns)


@kernel(varying=("rows",), loops=("each",), fixed=("columns",))
def layer_norm_backward_long_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, partial_ptr,
    rows, columns, each, dy_row, dy_column, x_row, x_column, weight_stride,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Longer rows, one at a time in two passes; the program's two rows of partial sums stay in memory."""
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
                g = dy * load_vector(weight_ptr, start + column, columns, weight_stride, False)
                sums += g
                products += g * ((x - mean) * rstd)
        shift = quotient(tl.sum(sums, 1, keep_dims=True), columns)
        slope = quotient(tl.sum(products, 1, keep_dims=True), columns)
        for start in range(0, columns, COLUMNS):
            inside = start + column < columns
            dy = load_tile(dy_ptr, row, start + column, rows, columns, dy_row, dy_column)
            normed = (load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column) - mean) * rstd
            if NEED_DX:
                g = dy * load_vector(weight_ptr, start + column, columns, weight_stride, False)
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


@kernel(varying=("rows",), fixed=("columns",))
def layer_norm_sums_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One block of columns per program: even programs sum up dweight, odd ones dbias."""
    block = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        column_sum(partial_ptr, dweight_ptr, block, rows, columns, 2 * columns, ROWS, COLUMNS)
    else:
        column_sum(partial_ptr + columns, dbias_ptr, block, rows, columns, 2 * columns, ROWS, COLUMNS)
