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
def load_token(pointer, token, inside, column, columns, token_stride, column_stride):
    """Load some columns of a token, 0 if it is not inside."""
    bound = tl.where(inside, columns, 0)
    return tl.load(pointer + token * token_stride + column * column_stride, column < bound, other=0.0)


@triton.jit
def load_weights(
    weight_ptr, bias_ptr, column, columns, weight_row, weight_column, bias_stride, WIDTH: tl.constexpr,
    BIAS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of the weight, that of the token itself first, and the bias; each [COLUMNS] in float32."""
    taps = ()
    for back in tl.static_range(WIDTH):
        offset = column * weight_row + (WIDTH - 1 - back) * weight_column
        taps += (tl.load(weight_ptr + offset, column < columns, other=0.0).to(tl.float32),)
    bias = tl.zeros([COLUMNS], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + column * bias_stride, column < columns, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def of_document(xs, token, begin, WIDTH: tl.constexpr):
    """xs of the W tokens up to the given one, 0 for those before its document."""
    seen = ()
    for place in tl.static_range(WIDTH):
        seen += (tl.where(token - (WIDTH - 1 - place) >= begin, xs[place], 0.0),)
    return seen


@triton.jit
def convolved(xs, taps, bias, WIDTH: tl.constexpr):
    """z of a token from xs of the W tokens up to it."""
    z = bias
    for back in tl.static_range(WIDTH):
        z = z + taps[back] * xs[WIDTH - 1 - back]
    return z


@triton.jit
def forward_tokens(
    y_ptr, cu_seqlens_ptr, xs, taps, bias, first, column, tokens, channels, documents, steps,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    """Store y of ROWS tokens. Without BORDERS all that they see are tokens of one document."""
    for row in tl.static_range(ROWS):
        token = first + row
        seen = ()
        for place in tl.static_range(WIDTH):
            seen += (xs[row + place].to(tl.float32),)
        bound = channels
        if BORDERS:
            begin, _ = find_documents(cu_seqlens_ptr, token, documents, steps, tokens)
            seen = of_document(seen, token, begin, WIDTH)
            bound = tl.where(token < tokens, channels, 0)
        z = convolved(seen, taps, bias, WIDTH)
        if SILU:
            share, _ = sigmoids(z)
            z = z * share
        tl.store(y_ptr + token * channels + column, z.to(y_ptr.dtype.element_ty), column < bound)


@kernel(varying=("tokens", "documents", "steps", "blocks", "weight_row"), fixed=("channels",))
def causal_conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, y_ptr,
    tokens, channels, documents, steps, blocks, x_token, x_column, weight_row, weight_column, bias_stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y of ROWS tokens and COLUMNS channels per program."""
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    xs = ()
    for place in tl.static_range(WIDTH - 1 + ROWS):
        token = first + (place - (WIDTH - 1))
        xs += (load_token(x_ptr, token, (token >= 0) & (token < tokens), column, channels, x_token, x_column),)
    taps, bias = load_weights(
        weight_ptr, bias_ptr, column, channels, weight_row, weight_column, bias_stride, WIDTH, BIAS, COLUMNS
    )
    begin, end = find_documents(cu_seqlens_ptr, first, documents, steps, tokens)
    if (first - (WIDTH - 1) >= begin) & (first + ROWS <= end):
        forward_tokens(
            y_ptr, cu_seqlens_ptr, xs, taps, bias, first, column, tokens, channels, documents, steps,
            WIDTH, SILU, ROWS, False,
        )  # fmt: skip
    else:
        forward_tokens(
            y_ptr, cu_seqlens_ptr, xs, taps, bias, first, column, tokens, channels, documents, steps,
            WIDTH, SILU, ROWS, True,
        )  # fmt: skip


@triton.jit
def backward_tokens(
    dx_ptr, cu_seqlens_ptr, x, dy, xs, dxs, dtaps, dbias, taps, bias, column,
    start, first, last, tokens, channels, documents, steps,
    WIDTH: tl.constexpr, SILU: tl.constexpr, NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, ROWS: tl.constexpr,
    BORDERS: tl.constexpr,
):  # fmt: skip
    """Add what ROWS tokens from `start` contribute to gradients, and store those of x that are complete by then.

    Without BORDERS all that the tokens see are tokens of one document, and all of them are before `last`.
    """
    for row in tl.static_range(ROWS):
        token = start + row
        seen = xs
        seen += (x[row].to(tl.float32),)
        if BORDERS:
            begin, end = find_documents(cu_seqlens_ptr, token, documents, steps, tokens)
            seen = of_document(seen, token, begin, WIDTH)
        dz = dy[row].to(tl.float32)
        if SILU:
            z = convolved(seen, taps, bias, WIDTH)
            share, complement = sigmoids(z)
            dz = dz * (share * (1.0 + z * complement))
        if BORDERS:
            dz = tl.where(token < end, dz, 0.0)
        if NEED_SUMS:
            own = tl.where(token < last, dz, 0.0) if BORDERS else dz
            dbias += own
            sums = ()
            for back in tl.static_range(WIDTH):
                sums += (dtaps[back] + own * seen[WIDTH - 1 - back],)
            dtaps = sums
        xs = seen[1:]
        if NEED_DX:
            dxs += (tl.zeros_like(dz),)
            sums = ()
            for place in tl.static_range(WIDTH):
                dx = dxs[place] + taps[WIDTH - 1 - place] * dz
                if BORDERS:
                    dx = tl.where((token - (WIDTH - 1 - place) >= begin) & (token < end), dx, dxs[place])
                sums += (dx,)
            done = token - (WIDTH - 1)
            inside = done >= first
            if BORDERS:
                inside &= (done < last) & (done < tokens)
            bound = tl.where(inside, channels, 0)
            tl.store(dx_ptr + done * channels + column, sums[0].to(dx_ptr.dtype.element_ty), column < bound)
            dxs = sums[1:]
    return xs, dxs, dtaps, dbias


@kernel(varying=("tokens", "documents", "steps", "blocks", "each", "weight_row"), fixed=("channels",))
def causal_conv_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, dx_ptr, partial_ptr,
    tokens, channels, documents, steps, blocks, each,
    dy_token, dy_column, x_token, x_column, weight_row, weight_column, bias_stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of `each` * ROWS tokens and COLUMNS channels per program, and their parts of dweight and dbias.

    xs are those of the W - 1 tokens before, dxs the gradients of these so far.
    """
    program = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first = program * each * ROWS
    last = first + each * ROWS
    taps, bias = load_weights(
        weight_ptr, bias_ptr, column, channels, weight_row, weight_column, bias_stride, WIDTH, BIAS, COLUMNS
    )
    dbias = tl.zeros([COLUMNS], tl.float32)
    xs, dxs, dtaps = (), (), (dbias,)
    for back in tl.static_range(WIDTH - 1, 0, -1):
        token = first - back
        inside = (token >= 0) & (token < tokens)
        xs += (load_token(x_ptr, token, inside, column, channels, x_token, x_column).to(tl.float32),)
        dxs += (dbias,)
        dtaps += (dbias,)
    begin, end = find_documents(cu_seqlens_ptr, first, documents, steps, tokens)
    # The gradients of the last tokens are complete W - 1 tokens later.
    for index in range(0, each + ((WIDTH + ROWS - 2) // ROWS if NEED_DX else 0)):
        start = first + index * ROWS
        x, dy = (), ()
        for row in tl.static_range(ROWS):
            inside = start + row < tokens
            x += (load_token(x_ptr, start + row, inside, column, channels, x_token, x_column),)
            dy += (load_token(dy_ptr, start + row, inside, column, channels, dy_token, dy_column),)
        if start >= end:
            begin, end = find_documents(cu_seqlens_ptr, start, documents, steps, tokens)
        if (start - (WIDTH - 1) >= begin) & (start + ROWS <= end) & (start < last):
            xs, dxs, dtaps, dbias = backward_tokens(
                dx_ptr, cu_seqlens_ptr, x, dy, xs, dxs, dtaps, dbias, taps, bias, column, start, first, last,
                tokens, channels, documents, steps, WIDTH, SILU, NEED_DX, NEED_SUMS, ROWS, False,
            )  # fmt: skip
        else:
            xs, dxs, dtaps, dbias = backward_tokens(
                dx_ptr, cu_seqlens_ptr, x, dy, xs, dxs, dtaps, dbias, taps, bias, column, start, first, last,
                tokens, channels, documents, steps, WIDTH, SILU, NEED_DX, NEED_SUMS, ROWS, True,
            )  # fmt: skip
    if NEED_SUMS:
        partial = partial_ptr + program * channels * (WIDTH + 1)
        for back in tl.static_range(WIDTH):
            tl.store(partial + column * WIDTH + (WIDTH - 1 - back), dtaps[back], column < channels)
        tl.store(partial + channels * WIDTH + column, dbias, column < channels)


@kernel(varying=("rows", "first"), fixed=("columns", "sums"))
def causal_conv_sums_kernel(
    partial_ptr, sum_ptr, rows, columns, sums, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum up some of the columns of the programs' partial sums; one block of columns per program."""
    column_sum(partial_ptr + first, sum_ptr, tl.program_id(0), rows, columns, sums, ROWS, COLUMNS)
