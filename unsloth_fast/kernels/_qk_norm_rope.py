"""The kernels of qk_norm_rope; qk_norm_rope.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._launch import kernel
from unsloth_fast.kernels._norms import column_sum, load_scale, quotient, rounded


@triton.jit
def partner_of(column, half):
    """For each column that with which it is rotated; and the sign of sin in the product with that one."""
    first = column < half
    return tl.where(first, column + half, column - half), tl.where(first, -1.0, 1.0)


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, positions_ptr, batch, token, table, column, other, half,
    cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column, positions_batch, positions_token,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """cos of a token's columns and sin of `other` columns, [1, COLUMNS]; NaN if its position is outside the table."""
    rotated = column < 2 * half
    row = token
    if POSITIONS:
        row = tl.load(positions_ptr + batch * positions_batch + token * positions_token).to(tl.int64)
        rotated = column < tl.where((row >= 0) & (row < table), 2 * half, 0)  # none if the row is outside the table
    cos = tl.load(cos_ptr + batch * cos_batch + row * cos_row + column * cos_column, rotated, other=float("nan"))
    sin = tl.load(sin_ptr + batch * sin_batch + row * sin_row + other * sin_column, rotated, other=float("nan"))
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def load_heads(x_ptr, head, column, inside, x_head, x_column):
    """Columns of the heads of a token, [HEADS, COLUMNS], in float32."""
    return tl.load(x_ptr + head * x_head + column * x_column, inside, other=0.0).to(tl.float32)


@triton.jit
def normed_heads(
    x_ptr, weight_ptr, rstd, head, column, inside, width, x_head, x_column, weight_stride,
    dtype: tl.constexpr, OFFSET: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """Heads as they are rotated: normalised, weighted and rounded."""
    n = load_heads(x_ptr, head, column, inside, x_head, x_column) * rstd
    return (rounded(n, dtype, LLAMA) * load_scale(weight_ptr, column, width, weight_stride, OFFSET)).to(dtype)


@triton.jit
def forward_heads(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, first, heads, column, other, half, width, spacing, cos, sin, eps,
    x_head, x_column, weight_stride,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate HEADS heads of a token, from the first."""
    dtype = out_ptr.dtype.element_ty
    head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    inside = (head < heads) & (column < width)
    x = load_heads(x_ptr, head, column, inside, x_head, x_column)
    mean = quotient(tl.sum(x * x, 1, keep_dims=True), width)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + head, rstd, head < heads)
    rotated = inside & (column < 2 * half)
    n = normed_heads(
        x_ptr, weight_ptr, rstd, head, column, inside, width, x_head, x_column, weight_stride, dtype, OFFSET, LLAMA
    )
    turned = normed_heads(
        x_ptr, weight_ptr, rstd, head, other, rotated, width, x_head, x_column, weight_stride, dtype, OFFSET, LLAMA
    )
    y = n.to(tl.float32) * cos + turned.to(tl.float32) * sin
    y = tl.where(rotated, y, n.to(tl.float32))
    tl.store(out_ptr + head * width * spacing + column, y.to(dtype), inside)


@triton.jit
def backward_heads(
    dy_ptr, x_ptr, dx_ptr, rstd_ptr, scale, sums, first, heads, column, other, half, width, spacing, cos, sin,
    dy_head, dy_column, x_head, x_column, LLAMA: tl.constexpr, HEADS: tl.constexpr, NEED_DX: tl.constexpr,
):  # fmt: skip
    """The gradient of HEADS heads of a token, stored, and that of the weight [HEADS, COLUMNS], added to sums."""
    dtype = x_ptr.dtype.element_ty
    head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    inside = (head < heads) & (column < width)
    rotated = inside & (column < 2 * half)
    rstd = tl.load(rstd_ptr + head, head < heads, other=0.0)
    n = load_heads(x_ptr, head, column, inside, x_head, x_column) * rstd
    dy = load_heads(dy_ptr, head, column, inside, dy_head, dy_column)
    turned = load_heads(dy_ptr, head, other, rotated, dy_head, dy_column)
    d = tl.where(rotated, dy * cos + turned * sin, dy)
    if NEED_DX:
        g = d * scale
        mean = quotient(tl.sum(g * n, 1, keep_dims=True), width)
        dx = rstd * (g - n * mean)
        tl.store(dx_ptr + head * width * spacing + column, dx.to(dtype), inside)
    return sums + d * rounded(n, dtype, LLAMA)


@kernel(varying=("length", "q_heads", "k_heads", "table"), loops=("steps",), fixed=("width", "half"))
def qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr,
    q_rstd_ptr, k_rstd_ptr, length, q_heads, k_heads, steps, width, half, table, eps,
    q_batch, q_head, q_token, q_column, k_batch, k_head, k_token, k_column, q_weight_stride, k_weight_stride,
    cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column, positions_batch, positions_token,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, POSITIONS: tl.constexpr, TOKEN_MAJOR: tl.constexpr,
    COLUMNS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
):  # fmt: skip
    """All heads of one token per program, Q_HEADS of q and K_HEADS of k per step."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    other, sign = partner_of(column, half)
    cos, sin = load_angles(
        cos_ptr, sin_ptr, positions_ptr, batch, token, table, column, column, half,
        cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column, positions_batch, positions_token, POSITIONS,
    )  # fmt: skip
    sin *= sign
    q_ptr += batch * q_batch + token * q_token
    k_ptr += batch * k_batch + token * k_token
    q_rstd_ptr += program * q_heads
    k_rstd_ptr += program * k_heads
    spacing = 1 if TOKEN_MAJOR else length
    q_out_ptr += (program * q_heads if TOKEN_MAJOR else batch * q_heads * length + token) * width
    k_out_ptr += (program * k_heads if TOKEN_MAJOR else batch * k_heads * length + token) * width
    for step in range(0, steps):
        forward_heads(
            q_ptr, q_weight_ptr, q_out_ptr, q_rstd_ptr, step * Q_HEADS, q_heads, column, other, half, width, spacing,
            cos, sin, eps, q_head, q_column, q_weight_stride, OFFSET, LLAMA, Q_HEADS,
        )  # fmt: skip
        forward_heads(
            k_ptr, k_weight_ptr, k_out_ptr, k_rstd_ptr, step * K_HEADS, k_heads, column, other, half, width, spacing,
            cos, sin, eps, k_head, k_column, k_weight_stride, OFFSET, LLAMA, K_HEADS,
        )  # fmt: skip


@kernel(
    varying=("tokens", "length", "q_heads", "k_heads", "table"),
    loops=("each", "q_steps", "k_steps"),
    fixed=("width", "half"),
)
def qk_norm_rope_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_rstd_ptr, k_rstd_ptr, dq_ptr, dk_ptr, partial_ptr,
    tokens, length, each, q_heads, k_heads, q_steps, k_steps, width, half, table,
    dq_batch, dq_head, dq_token, dq_column, dk_batch, dk_head, dk_token, dk_column,
    q_batch, q_head, q_token, q_column, k_batch, k_head, k_token, k_column, q_weight_stride, k_weight_stride,
    cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column, positions_batch, positions_token,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, POSITIONS: tl.constexpr, TOKEN_MAJOR: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DWEIGHT: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Each program takes `each` tokens with all of their heads, HEADS per step; it writes a row of partial sums."""
    first = tl.program_id(0).to(tl.int64)
    # As a tile, to get the register layout of the heads: a single row may get another one, which all others follow.
    column = tl.broadcast_to(tl.arange(0, COLUMNS).to(tl.int64)[None, :], HEADS, COLUMNS)
    other, sign = partner_of(column, half)
    spacing = 1 if TOKEN_MAJOR else length
    q_scale = load_scale(q_weight_ptr, column, width, q_weight_stride, OFFSET)
    k_scale = load_scale(k_weight_ptr, column, width, k_weight_stride, OFFSET)
    q_sums = tl.zeros([HEADS, COLUMNS], tl.float32)
    k_sums = tl.zeros([HEADS, COLUMNS], tl.float32)
    for index in range(0, each):
        program = index * tl.num_programs(0).to(tl.int64) + first
        batch, token = program // length, program % length
        # The last tokens of some programs do not exist: they have no heads.
        q_count = tl.where(program < tokens, q_heads, 0)
        k_count = tl.where(program < tokens, k_heads, 0)
        batch = tl.where(program < tokens, batch, 0)
        cos, sin = load_angles(
            cos_ptr, sin_ptr, positions_ptr, batch, token, table, column, other, half,
            cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column, positions_batch, positions_token, POSITIONS,
        )  # fmt: skip
        sin *= -sign
        q_at = (program * q_heads if TOKEN_MAJOR else batch * q_heads * length + token) * width
        k_at = (program * k_heads if TOKEN_MAJOR else batch * k_heads * length + token) * width
        for step in range(0, q_steps):
            q_sums = backward_heads(
                dq_out_ptr + batch * dq_batch + token * dq_token, q_ptr + batch * q_batch + token * q_token,
                dq_ptr + q_at, q_rstd_ptr + program * q_heads, q_scale, q_sums, step * HEADS, q_count,
                column, other, half, width, spacing, cos, sin, dq_head, dq_column, q_head, q_column,
                LLAMA, HEADS, NEED_DX,
            )  # fmt: skip
        for step in range(0, k_steps):
            k_sums = backward_heads(
                dk_out_ptr + batch * dk_batch + token * dk_token, k_ptr + batch * k_batch + token * k_token,
                dk_ptr + k_at, k_rstd_ptr + program * k_heads, k_scale, k_sums, step * HEADS, k_count,
                column, other, half, width, spacing, cos, sin, dk_head, dk_column, k_head, k_column,
                LLAMA, HEADS, NEED_DX,
            )  # fmt: skip
    if NEED_DWEIGHT:
        column = tl.arange(0, COLUMNS)
        partial_ptr += first * 2 * width
        tl.store(partial_ptr + column, tl.sum(q_sums, 0), column < width)
        tl.store(partial_ptr + width + column, tl.sum(k_sums, 0), column < width)


@kernel(varying=("rows",), fixed=("columns",))
def qk_norm_rope_sums_kernel(
    partial_ptr, dq_weight_ptr, dk_weight_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum up the programs' partial sums: the even programs a block of columns for q, the odd ones for k."""
    block = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        column_sum(partial_ptr, dq_weight_ptr, block, rows, columns, 2 * columns, ROWS, COLUMNS)
    else:
        column_sum(partial_ptr + columns, dk_weight_ptr, block, rows, columns, 2 * columns, ROWS, COLUMNS)
