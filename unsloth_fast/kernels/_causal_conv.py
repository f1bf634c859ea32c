"""The kernels of causal_conv; causal_conv.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._gated import sigmoids
from unsloth_fast.kernels._launch import kernel
from unsloth_fast.kernels._norms import column_sum


@triton.jit
def find_documents(cu_seqlens_ptr, token, documents, steps, tokens):
    """The first token of the document of each token, and that of the next document."""
    low = tl.zeros_like(token)
    high = low + documents - 1
    for _ in range(0, steps):
        middle = (low + high + 1) // 2
        reached = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    begin = tl.maximum(tl.load(cu_seqlens_ptr + low), 0)
    return begin, tl.minimum(tl.load(cu_seqlens_ptr + low + 1), tokens)


@triton.jit
def load_tokens(pointer, token, inside, column, columns, token_stride, column_stride):
    """Load some tokens [ROWS, COLUMNS] in float32, 0 for those that are not inside."""
    offset = token * token_stride + column * column_stride
    return tl.load(pointer + offset, inside & (column < columns), other=0.0).to(tl.float32)


@triton.jit
def load_taps(weight_ptr, column, columns, weight_row, weight_column, WIDTH: tl.constexpr):
    """The columns of the weight, each [1, COLUMNS] in float32; that of the token itself comes first."""
    taps = ()
    for back in tl.static_range(WIDTH):
        offset = column * weight_row + (WIDTH - 1 - back) * weight_column
        taps += (tl.load(weight_ptr + offset, column < columns, other=0.0).to(tl.float32),)
    return taps


@kernel(varying=("tokens", "documents", "steps", "blocks", "weight_row"), fixed=("channels",))
def causal_conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, y_ptr,
    tokens, channels, documents, steps, blocks, x_token, x_column, weight_row, weight_column, bias_stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y of ROWS tokens and COLUMNS channels per program."""
    token = ((tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    begin, _ = find_documents(cu_seqlens_ptr, token, documents, steps, tokens)
    taps = load_taps(weight_ptr, column, channels, weight_row, weight_column, WIDTH)
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + column * bias_stride, column < channels, other=0.0).to(tl.float32)
    for back in tl.static_range(WIDTH):
        inside = (token - back >= begin) & (token < tokens)
        z += taps[back] * load_tokens(x_ptr, token - back, inside, column, channels, x_token, x_column)
    if SILU:
        share, _ = sigmoids(z)
        z = z * share
    tl.store(y_ptr + token * channels + column, z.to(y_ptr.dtype.element_ty), (token < tokens) & (column < channels))


@kernel(varying=("tokens", "documents", "steps", "blocks", "weight_row"), loops=("each",), fixed=("channels",))
def causal_conv_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, dx_ptr, partial_ptr,
    tokens, channels, documents, steps, blocks, each,
    dy_token, dy_column, x_token, x_column, weight_row, weight_column, bias_stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of `each` * ROWS tokens and COLUMNS channels per program, and their parts of dweight and dbias."""
    program = (tl.program_id(0) // blocks).to(tl.int64)
    column = ((tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    taps = load_taps(weight_ptr, column, channels, weight_row, weight_column, WIDTH)
    bias = tl.zeros([1, COLUMNS], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + column * bias_stride, column < channels, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    dtaps = ()
    for _back in tl.static_range(WIDTH):
        dtaps += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for index in range(0, each):
        token = ((program * each + index) * ROWS + tl.arange(0, ROWS))[:, None]
        begin, end = find_documents(cu_seqlens_ptr, token, documents, steps, tokens)
        xs = ()  # of the tokens from W - 1 before to W - 1 behind
        for place in tl.static_range(2 * WIDTH - 1):
            other = token + (place - WIDTH + 1)
            if (SILU and (NEED_DX or place < WIDTH)) or (NEED_SUMS and place < WIDTH):
                inside = (other >= begin) & (other < end) & (token < tokens)
                xs += (load_tokens(x_ptr, other, inside, column, channels, x_token, x_column),)
            else:
                xs += (0.0,)
        dx = tl.zeros([ROWS, COLUMNS], tl.float32)
        for ahead in tl.static_range(WIDTH if NEED_DX else 1):
            inside = (token + ahead < end) & (token < tokens)
            dz = load_tokens(dy_ptr, token + ahead, inside, column, channels, dy_token, dy_column)
            if SILU:
                z = bias
                for back in tl.static_range(WIDTH):
                    # A token before the document of this one is not in xs, and is not in that of the later one either.
                    z = z + taps[back] * xs[WIDTH - 1 + ahead - back]
                share, complement = sigmoids(z)
                dz = tl.where(inside, dz * (share * (1.0 + z * complement)), 0.0)
            if NEED_DX:
                dx += tl.where(inside, taps[ahead] * dz, 0.0)
            if NEED_SUMS and ahead == 0:
                dbias += dz
                sums = ()
                for back in tl.static_range(WIDTH):
                    sums += (dtaps[back] + dz * xs[WIDTH - 1 - back],)
                dtaps = sums
        if NEED_DX:
            inside = (token < tokens) & (column < channels)
            tl.store(dx_ptr + token * channels + column, dx.to(dx_ptr.dtype.element_ty), inside)
    if NEED_SUMS:
        partial = partial_ptr + program * channels * (WIDTH + 1)
        for back in tl.static_range(WIDTH):
            total = tl.sum(dtaps[back], 0, keep_dims=True)
            tl.store(partial + column * WIDTH + (WIDTH - 1 - back), total, column < channels)
        tl.store(partial + channels * WIDTH + column, tl.sum(dbias, 0, keep_dims=True), column < channels)


@kernel(varying=("rows", "first"), fixed=("columns", "sums"))
def causal_conv_sums_kernel(
    partial_ptr, sum_ptr, rows, columns, sums, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum up some of the columns of the programs' partial sums; one block of columns per program."""
    column_sum(partial_ptr + first, sum_ptr, tl.program_id(0), rows, columns, sums, ROWS, COLUMNS)
