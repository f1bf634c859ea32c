"""The kernels of gated_rms_norm; gated_rms_norm.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._gated import sigmoids
from unsloth_fast.kernels._launch import kernel
from unsloth_fast.kernels._norms import load_scale, load_tile, quotient, rounded


@triton.jit
def activation_and_slope(gate):
    """SiLU and its derivative."""
    share, complement = sigmoids(gate)
    return gate * share, share * (1.0 + gate * complement)


@triton.jit
def load_forward(
    x_ptr, gate_ptr, row, column, rows, size, x_row, x_column, gate_row, gate_column, BEFORE: tl.constexpr
):  # fmt: skip
    """v and a of a tile."""
    x = load_tile(x_ptr, row, column, rows, size, x_row, x_column)
    activation, _ = activation_and_slope(load_tile(gate_ptr, row, column, rows, size, gate_row, gate_column))
    return x if BEFORE else x * activation, activation


@triton.jit
def store_normed(
    y_ptr, weight_ptr, v, activation, rstd, row, column, rows, groups, size, weight_stride,
    BEFORE: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """Normalise a tile and store y."""
    dtype = y_ptr.dtype.element_ty
    y = rounded(v * rstd, dtype, LLAMA) * load_scale(weight_ptr, column, size, weight_stride, 0)
    if BEFORE:
        y *= activation
    tl.store(y_ptr + row * groups * size + column, y.to(dtype), (row < rows) & (column < size))


@kernel(varying=("rows", "groups"), fixed=("size",))
def gated_rms_norm_forward_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rstd_ptr,
    rows, groups, size, x_row, x_column, gate_row, gate_column, weight_stride, eps,
    BEFORE: tl.constexpr, LLAMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a group per program. WHOLE: a tile holds whole groups; otherwise they are read twice."""
    group = (tl.program_id(0) % groups).to(tl.int64)
    row = ((tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    x_ptr += group * size * x_column
    gate_ptr += group * size * gate_column
    weight_ptr += group * size * weight_stride
    y_ptr += group * size
    v, activation = load_forward(
        x_ptr, gate_ptr, row, column, rows, size, x_row, x_column, gate_row, gate_column, BEFORE
    )
    squares = v * v
    if not WHOLE:
        for start in range(COLUMNS, size, COLUMNS):
            v, activation = load_forward(
                x_ptr, gate_ptr, row, start + column, rows, size, x_row, x_column, gate_row, gate_column, BEFORE
            )
            squares += v * v
    mean = quotient(tl.sum(squares, 1, keep_dims=True), size)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row * groups + group, rstd, row < rows)
    if WHOLE:
        store_normed(
            y_ptr, weight_ptr, v, activation, rstd, row, column, rows, groups, size, weight_stride, BEFORE, LLAMA
        )
    else:
        for start in range(0, size, COLUMNS):
            v, activation = load_forward(
                x_ptr, gate_ptr, row, start + column, rows, size, x_row, x_column, gate_row, gate_column, BEFORE
            )
            store_normed(
                y_ptr, weight_ptr, v, activation, rstd, row, start + column, rows, groups, size, weight_stride,
                BEFORE, LLAMA,
            )  # fmt: skip


@triton.jit
def load_backward(
    dy_ptr, x_ptr, gate_ptr, scale, row, column, rows, size, rstd,
    dy_row, dy_column, x_row, x_column, gate_row, gate_column, BEFORE: tl.constexpr,
):  # fmt: skip
    """dy, x, a, a', n, the gradient of weight * n, and g of a tile."""
    dy = load_tile(dy_ptr, row, column, rows, size, dy_row, dy_column)
    x = load_tile(x_ptr, row, column, rows, size, x_row, x_column)
    activation, slope = activation_and_slope(load_tile(gate_ptr, row, column, rows, size, gate_row, gate_column))
    if BEFORE:
        n = x * rstd
        of_product = dy * activation
    else:
        n = x * activation * rstd
        of_product = dy
    return dy, x, activation, slope, n, of_product, of_product * scale


@triton.jit
def gradients(
    dy, x, activation, slope, n, g, scale, mean, rstd, dtype: tl.constexpr, BEFORE: tl.constexpr, LLAMA: tl.constexpr
):  # fmt: skip
    """The gradients of x and gate."""
    dv = rstd * (g - n * mean)
    if BEFORE:
        return dv, dy * (rounded(n, dtype, LLAMA) * scale) * slope
    return dv * activation, dv * x * slope


@kernel(varying=("rows", "groups"), loops=("each",), fixed=("size",))
def gated_rms_norm_backward_kernel(
    dy_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr, partial_ptr, rows, groups, size, each,
    dy_row, dy_column, x_row, x_column, gate_row, gate_column, weight_stride,
    BEFORE: tl.constexpr, LLAMA: tl.constexpr, NEED_DX: tl.constexpr, NEED_DGATE: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes `each` * ROWS rows of a group; those of a group take neighbouring rows at the same time."""
    dtype = x_ptr.dtype.element_ty
    group = (tl.program_id(0) % groups).to(tl.int64)
    program = (tl.program_id(0) // groups).to(tl.int64)
    programs = tl.num_programs(0) // groups
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    first = group * size
    dy_ptr += first * dy_column
    x_ptr += first * x_column
    gate_ptr += first * gate_column
    weight_ptr += first * weight_stride
    dx_ptr += first
    dgate_ptr += first
    partial_ptr += program * groups * size + first
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    # As a tile, to get the register layout of x: a single row may get another one, which all others follow.
    weight_column = tl.broadcast_to(column, ROWS, COLUMNS)
    if WHOLE and COLUMNS <= 4096:
        scale = load_scale(weight_ptr, weight_column, size, weight_stride, 0)
    for index in tl.range(0, each, num_stages=STAGES):
        row = ((index * programs.to(tl.int64) + program) * ROWS + tl.arange(0, ROWS))[:, None]
        rstd = tl.load(rstd_ptr + row * groups + group, row < rows, other=0.0)
        if WHOLE:
            if COLUMNS > 4096:  # no registers are left for it: on an H200, 8192 columns take 0.89 of the time
                scale = load_scale(weight_ptr, weight_column, size, weight_stride, 0)
            dy, x, activation, slope, n, of_product, g = load_backward(
                dy_ptr, x_ptr, gate_ptr, scale, row, column, rows, size, rstd,
                dy_row, dy_column, x_row, x_column, gate_row, gate_column, BEFORE,
            )  # fmt: skip
            mean = quotient(tl.sum(g * n, 1, keep_dims=True), size)
            dx, dgate = gradients(dy, x, activation, slope, n, g, scale, mean, rstd, dtype, BEFORE, LLAMA)
            inside = (row < rows) & (column < size)
            if NEED_DX:
                tl.store(dx_ptr + row * groups * size + column, dx.to(dtype), inside)
            if NEED_DGATE:
                tl.store(dgate_ptr + row * groups * size + column, dgate.to(dtype), inside)
            if NEED_DWEIGHT:
                dweight += of_product * rounded(n, dtype, LLAMA)
        else:
            products = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, size, COLUMNS):
                scale = load_scale(weight_ptr, start + column, size, weight_stride, 0)
                dy, x, activation, slope, n, of_product, g = load_backward(
                    dy_ptr, x_ptr, gate_ptr, scale, row, start + column, rows, size, rstd,
                    dy_row, dy_column, x_row, x_column, gate_row, gate_column, BEFORE,
                )  # fmt: skip
                products += g * n
            mean = quotient(tl.sum(products, 1, keep_dims=True), size)
            for start in range(0, size, COLUMNS):
                scale = load_scale(weight_ptr, start + column, size, weight_stride, 0)
                dy, x, activation, slope, n, of_product, g = load_backward(
                    dy_ptr, x_ptr, gate_ptr, scale, row, start + column, rows, size, rstd,
                    dy_row, dy_column, x_row, x_column, gate_row, gate_column, BEFORE,
                )  # fmt: skip
                dx, dgate = gradients(dy, x, activation, slope, n, g, scale, mean, rstd, dtype, BEFORE, LLAMA)
                inside = (row < rows) & (start + column < size)
                if NEED_DX:
                    tl.store(dx_ptr + row * groups * size + start + column, dx.to(dtype), inside)
                if NEED_DGATE:
                    tl.store(dgate_ptr + row * groups * size + start + column, dgate.to(dtype), inside)
                if NEED_DWEIGHT:  # a tile has one row; its sums are in memory
                    at = partial_ptr + start + column
                    before = tl.load(at, (start + column < size) & (index > 0), other=0.0)
                    tl.store(at, before + of_product * rounded(n, dtype, LLAMA), start + column < size)
            tl.debug_barrier()  # the next row reads the partial sums that this one wrote
    if NEED_DWEIGHT and WHOLE:
        tl.store(partial_ptr + column, tl.sum(dweight, 0, keep_dims=True), column < size)
