"""The kernels of mamba2_scan; mamba2_scan.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from unsloth_fast.kernels._gated_delta_rule import find_document, load_column, load_factor
from unsloth_fast.kernels._launch import kernel
from unsloth_fast.kernels._packed_attention import EMULATED, find_tile, load_rows, store_rows


@triton.jit
def multiply(a, b):
    """The matrix product, added up in float32: of bfloat16 on tensor cores, of two dtypes in float32."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def as_factor(values, dtype: tl.constexpr):
    """Round float32 values for a product with numbers of this dtype; float16 has no range for a state."""
    if dtype == tl.bfloat16:
        values = values.to(tl.bfloat16)
    return values.to(tl.float32) if EMULATED else values


@triton.jit
def load_decays(dt_ptr, a, row, length, dt_token, ROWS: tl.constexpr):
    """The dt of a chunk, and the sums of a dt up to each row and over all rows."""
    dt = load_column(dt_ptr, row, length, dt_token)
    total = tl.cumsum(a * dt, 0)
    return dt, total, tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, total, 0.0), 0)


@triton.jit
def decays_between(total, ROWS: tl.constexpr):
    """The decay from each row j to each row i, 0 where j > i."""
    place = tl.arange(0, ROWS)
    lower = place[None, :] <= place[:, None]
    return tl.where(lower, tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0)), 0.0)


@kernel(varying=("tokens", "heads", "group", "slices", "dt_token"), fixed=("width", "columns"))
def mamba2_scan_states_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, cu_seqlens_ptr, states_ptr,
    tokens, heads, group, width, columns, slices, x_token, x_head, dt_token, dt_head, b_token, b_head,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One document, head and part of its state per program: the state before each chunk, transposed.

    BACKWARD: the gradient of the state behind each chunk, the last one first, from dy and c in place of x and b.
    """
    part = tl.program_id(0) % slices
    document = tl.program_id(0) // (slices * heads)
    head = (tl.program_id(0) // slices % heads).to(tl.int64)
    begin, length, first = find_document(cu_seqlens_ptr, document, tokens, ROWS)
    across = (width + WIDTH - 1) // WIDTH
    column = part // across * COLUMNS + tl.arange(0, COLUMNS)
    depth = part % across * WIDTH + tl.arange(0, WIDTH)
    x_ptr += begin * x_token + head * x_head
    b_ptr += begin * b_token + head // group * b_head
    dt_ptr += begin * dt_token + head * dt_head
    a = tl.load(a_ptr + head).to(tl.float32)
    state = tl.zeros([COLUMNS, WIDTH], tl.float32)
    chunks = (length + ROWS - 1) // ROWS
    for step in tl.range(0, chunks, num_stages=STAGES):
        index = chunks - 1 - step if BACKWARD else step
        row = index * ROWS + tl.arange(0, ROWS)
        at = states_ptr + ((first + index) * heads + head) * columns * width
        store_rows(at, state, column, columns, depth, width, width)
        dt, total, last = load_decays(dt_ptr, a, row, length, dt_token, ROWS)
        factor = tl.exp(total) if BACKWARD else tl.exp(last - total) * dt
        x = load_rows(x_ptr, row, length, column, columns, x_token)
        b = load_rows(b_ptr, row, length, depth, width, b_token)
        added = as_factor(factor[:, None] * x.to(tl.float32), x_ptr.dtype.element_ty)
        state = tl.exp(last) * state + multiply(tl.trans(added), b)


@kernel(varying=("tokens", "documents", "heads", "group", "slices", "dt_token"), fixed=("width", "columns"))
def mamba2_scan_forward_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, cu_seqlens_ptr, states_ptr, y_ptr,
    tokens, documents, heads, group, width, columns, slices,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One chunk, head and slice of its columns per program."""
    tile = tl.program_id(0) // (slices * heads)
    head = (tl.program_id(0) // slices % heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS)
    if start >= length:
        return
    row = start + tl.arange(0, ROWS)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    b_ptr += begin * b_token + head // group * b_head
    c_ptr += begin * c_token + head // group * c_head
    states_ptr += (tile * heads + head) * columns * width
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for left in range(0, width, WIDTH):
        depth = left + tl.arange(0, WIDTH)
        b = load_rows(b_ptr, row, length, depth, width, b_token)
        c = load_rows(c_ptr, row, length, depth, width, c_token)
        state = load_rows(states_ptr, column, columns, depth, width, width)
        scores += multiply(c, tl.trans(b))
        y += multiply(c, tl.trans(state))
    a = tl.load(a_ptr + head).to(tl.float32)
    dt, total, _ = load_decays(dt_ptr + begin * dt_token + head * dt_head, a, row, length, dt_token, ROWS)
    x = load_rows(x_ptr + begin * x_token + head * x_head, row, length, column, columns, x_token)
    weights = as_factor(scores * decays_between(total, ROWS) * dt[None, :], x_ptr.dtype.element_ty)
    y = tl.exp(total)[:, None] * y + multiply(weights, x) + tl.load(d_ptr + head).to(tl.float32) * x.to(tl.float32)
    store_rows(y_ptr + (begin * heads + head) * columns, y, row, length, column, columns, heads * columns)


@kernel(varying=("tokens", "documents", "heads", "group", "dt_token"), fixed=("width", "columns"))
def mamba2_scan_dx_kernel(
    dy_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, cu_seqlens_ptr, states_ptr, dstates_ptr,
    dx_ptr, ddt_ptr, da_ptr, dd_ptr,
    tokens, documents, heads, group, width, columns,
    dy_token, dy_head, x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx and ddt of one chunk and head per program, and what its tokens contribute to da and dd."""
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS)
    if start >= length:
        return
    row = start + tl.arange(0, ROWS)
    b_ptr += begin * b_token + head // group * b_head
    c_ptr += begin * c_token + head // group * c_head
    dy_ptr += begin * dy_token + head * dy_head
    x_ptr += begin * x_token + head * x_head
    dtype = dx_ptr.dtype.element_ty
    chunk = tile * heads + head
    states_ptr += chunk * columns * width
    dstates_ptr += chunk * columns * width
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    for left in range(0, width, WIDTH):
        depth = left + tl.arange(0, WIDTH)
        b = load_rows(b_ptr, row, length, depth, width, b_token)
        c = load_rows(c_ptr, row, length, depth, width, c_token)
        scores += multiply(c, tl.trans(b))
    a = tl.load(a_ptr + head).to(tl.float32)
    d = tl.load(d_ptr + head).to(tl.float32)
    dt, total, last = load_decays(dt_ptr + begin * dt_token + head * dt_head, a, row, length, dt_token, ROWS)
    scores *= decays_between(total, ROWS)
    pairs = tl.zeros([ROWS, ROWS], tl.float32)
    skipped = tl.zeros([ROWS], tl.float32)
    for side in range(0, columns, COLUMNS):
        column = side + tl.arange(0, COLUMNS)
        x = load_rows(x_ptr, row, length, column, columns, x_token)
        dy = load_rows(dy_ptr, row, length, column, columns, dy_token)
        pairs += multiply(dy, tl.trans(x))
        skipped += tl.sum(dy.to(tl.float32) * x.to(tl.float32), 1)
    pairs *= scores
    # Row l of dg is the sum over all decays across l: of pairs i >= l > j, and of what comes from and goes to states.
    below = row[None, :] < row[:, None]
    until = tl.where(row[None, :] <= row[:, None], 1.0, 0.0)
    across = multiply(as_factor(tl.where(below, pairs * dt[None, :], 0.0), dtype), as_factor(1.0 - until, dtype))
    ddt = tl.sum(pairs, 0)
    dg = tl.sum(until * across, 0)
    factor = as_factor(scores, dtype)
    by_old = tl.zeros([ROWS], tl.float32)  # what the decays from the old state to a row contribute to dg
    by_new = tl.zeros([ROWS], tl.float32)  # those from a row to the new state, without dt
    through = 0.0  # that over the whole chunk
    for side in range(0, columns, COLUMNS):
        column = side + tl.arange(0, COLUMNS)
        dy = load_rows(dy_ptr, row, length, column, columns, dy_token)
        new = tl.zeros([ROWS, COLUMNS], tl.float32)
        for left in range(0, width, WIDTH):
            depth = left + tl.arange(0, WIDTH)
            state = load_rows(states_ptr, column, columns, depth, width, width)
            dstate = load_rows(dstates_ptr, column, columns, depth, width, width)
            old = multiply(load_rows(c_ptr, row, length, depth, width, c_token), tl.trans(state))
            by_old += tl.sum(old * dy.to(tl.float32), 1)
            new += multiply(load_rows(b_ptr, row, length, depth, width, b_token), tl.trans(dstate))
            through += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
        new *= tl.exp(last - total)[:, None]
        by_new += tl.sum(new * load_factor(x_ptr, row, length, column, columns, x_token), 1)
        dx = dt[:, None] * (multiply(tl.trans(factor), dy) + new) + d * dy.to(tl.float32)
        store_rows(dx_ptr + (begin * heads + head) * columns, dx, row, length, column, columns, heads * columns)
    dg += tl.sum(until * (tl.exp(total) * by_old)[:, None], 0) + tl.exp(last) * through
    dg += tl.sum((1.0 - until) * (dt * by_new)[:, None], 0)
    ddt += by_new + a * dg
    place = (begin + row.to(tl.int64)) * heads + head
    tl.store(ddt_ptr + place, ddt.to(ddt_ptr.dtype.element_ty), row < length)
    tl.store(da_ptr + place, dt * dg, row < length)
    tl.store(dd_ptr + place, skipped, row < length)


@kernel(varying=("tokens", "documents", "heads", "group", "slices", "splits", "dt_token"), fixed=("width", "columns"))
def mamba2_scan_dbdc_kernel(
    dy_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, cu_seqlens_ptr, states_ptr, dstates_ptr, db_ptr, dc_ptr,
    tokens, documents, heads, group, width, columns, slices, splits,
    dy_token, dy_head, x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk, slice of the columns of b and HEADS heads of a group per program: the part of db and dc of these."""
    kv_heads = heads // group
    split = tl.program_id(0) // slices % splits
    tile = tl.program_id(0) // (slices * splits * kv_heads)
    kv_head = (tl.program_id(0) // (slices * splits) % kv_heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS)
    if start >= length:
        return
    row = start + tl.arange(0, ROWS)
    depth = tl.program_id(0) % slices * WIDTH + tl.arange(0, WIDTH)
    b = load_rows(b_ptr + begin * b_token + kv_head * b_head, row, length, depth, width, b_token)
    c = load_rows(c_ptr + begin * c_token + kv_head * c_head, row, length, depth, width, c_token)
    db = tl.zeros([ROWS, WIDTH], tl.float32)
    dc = tl.zeros([ROWS, WIDTH], tl.float32)
    sides = (columns + COLUMNS - 1) // COLUMNS
    mine = tl.minimum(HEADS, group - split * HEADS)
    for step in tl.range(0, mine * sides, num_stages=STAGES):
        head = kv_head * group + split * HEADS + step // sides
        column = step % sides * COLUMNS + tl.arange(0, COLUMNS)
        a = tl.load(a_ptr + head).to(tl.float32)
        dt, total, last = load_decays(dt_ptr + begin * dt_token + head * dt_head, a, row, length, dt_token, ROWS)
        states = (tile * heads + head) * columns * width
        x = load_rows(x_ptr + begin * x_token + head * x_head, row, length, column, columns, x_token)
        dy = load_rows(dy_ptr + begin * dy_token + head * dy_head, row, length, column, columns, dy_token)
        by_x = multiply(dy, tl.trans(x)) * decays_between(total, ROWS) * dt[None, :]
        weights = as_factor(by_x, b_ptr.dtype.element_ty)
        dc += multiply(weights, b)
        db += multiply(tl.trans(weights), c)
        until, after = tl.exp(total)[:, None], (tl.exp(last - total) * dt)[:, None]
        dc += until * multiply(dy, load_rows(states_ptr + states, column, columns, depth, width, width))
        db += after * multiply(x, load_rows(dstates_ptr + states, column, columns, depth, width, width))
    part = ((split * tokens + begin) * kv_heads + kv_head) * width
    store_rows(db_ptr + part, db, row, length, depth, width, kv_heads * width)
    store_rows(dc_ptr + part, dc, row, length, depth, width, kv_heads * width)


@kernel(varying=("tokens", "splits"), fixed=("across",))
def mamba2_scan_sum_kernel(
    db_parts_ptr, dc_parts_ptr, db_ptr, dc_ptr, tokens, across, splits, SIZE: tl.constexpr
):  # fmt: skip
    """db and dc, the sums of their parts [splits, tokens * across] in order; SIZE elements of both per program."""
    size = tl.cast(tokens, tl.int64) * across
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    db = tl.zeros([SIZE], tl.float32)
    dc = tl.zeros([SIZE], tl.float32)
    for _ in range(0, splits):
        db += tl.load(db_parts_ptr + place, place < size, other=0.0)
        dc += tl.load(dc_parts_ptr + place, place < size, other=0.0)
        db_parts_ptr += size
        dc_parts_ptr += size
    tl.store(db_ptr + place, db.to(db_ptr.dtype.element_ty), place < size)
    tl.store(dc_ptr + place, dc.to(dc_ptr.dtype.element_ty), place < size)
