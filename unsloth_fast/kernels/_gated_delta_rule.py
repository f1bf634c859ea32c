"""The kernels of gated_delta_rule; gated_delta_rule.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from unsloth_fast.kernels._launch import kernel
from unsloth_fast.kernels._packed_attention import EMULATED, find_tile, load_rows, store_rows


@triton.jit
def multiply(a, b, NARROW: tl.constexpr):
    """The matrix product in float32, on tensor cores if NARROW: then the factors are rounded to bfloat16 first."""
    if NARROW:
        product = tl.dot(narrowed(a), narrowed(b))
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return product


@triton.jit
def narrowed(values):
    """Round to bfloat16; the interpreter, which would multiply the bits, gets the rounded numbers in float32."""
    rounded = values.to(tl.bfloat16)
    return rounded.to(tl.float32) if EMULATED else rounded


@triton.jit
def load_factor(pointer, row, length, column, width, row_stride):
    """Load rows of a document in float32, 0 outside."""
    return load_rows(pointer, row, length, column, width, row_stride).to(tl.float32)


@triton.jit
def load_column(pointer, row, length, row_stride):
    """Load one number per row of a chunk in float32, 0 beyond the document."""
    return tl.load(pointer + row.to(tl.int64) * row_stride, row < length, other=0.0).to(tl.float32)


@triton.jit
def load_decays(g_ptr, row, length, g_token, ROWS: tl.constexpr):
    """Decays up to each row of a chunk, from each row to the last, over the whole chunk, and between rows j <= i."""
    place = tl.arange(0, ROWS)
    total = tl.cumsum(load_column(g_ptr, row, length, g_token), 0)
    last = tl.sum(tl.where(place == ROWS - 1, total, 0.0), 0)
    lower = place[None, :] <= place[:, None]
    between = tl.where(lower, tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0)), 0.0)
    return tl.exp(total), tl.exp(last - total), tl.exp(last), between


@triton.jit
def inverse(below, ROWS: tl.constexpr):
    """The inverse of I + below, for a matrix of 16 or 32 rows that is 0 on and above its diagonal.

    Blocks of 16 x 16 on the diagonal by substitution, row by row. Their inverse is D, what is outside of them L: as the
    square of D L is 0, the inverse is D - D L D.
    """
    BLOCKS: tl.constexpr = ROWS // 16
    number = tl.arange(0, BLOCKS)
    same = number[:, None, None, None] == number[None, None, :, None]
    parts = tl.reshape(below, [BLOCKS, 16, BLOCKS, 16])
    diagonal = tl.sum(tl.where(same, parts, 0.0), 2)
    line = tl.arange(0, 16)[None, :, None]
    solved = tl.where(line == tl.arange(0, 16)[None, None, :], 1.0, 0.0) + tl.zeros([BLOCKS, 16, 16], tl.float32)
    for step in range(1, 16):
        factors = tl.sum(tl.where(line == step, diagonal, 0.0), 1)
        change = tl.sum(factors[:, :, None] * solved, 1)
        solved = tl.where(line == step, solved - change[:, None, :], solved)
    whole = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), [ROWS, ROWS])
    if BLOCKS > 1:
        outside = multiply(whole, tl.reshape(tl.where(same, 0.0, parts), [ROWS, ROWS]), False)
        whole -= multiply(outside, whole, False)
    return whole


@triton.jit
def square(ROWS: tl.constexpr):
    """Offsets of a matrix of ROWS x ROWS."""
    place = tl.arange(0, ROWS)
    return place[:, None] * ROWS + place[None, :]


@triton.jit
def find_document(cu_seqlens_ptr, document, tokens, ROWS: tl.constexpr):
    """The first token of a document, its length, and the number of its first chunk among all chunks."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + document), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + document + 1), 0), tokens)
    return begin.to(tl.int64), end - begin, (begin // ROWS + document).to(tl.int64)


@kernel(varying=("tokens", "documents", "heads", "group", "g_token", "beta_token"), fixed=("width",))
def gated_delta_rule_solve_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, solved_ptr,
    tokens, documents, heads, group, width, q_token, q_head, k_token, k_head, g_token, g_head, beta_token, beta_head,
    NARROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 and P of one chunk and head of v per program."""
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS)
    if start >= length:
        return
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    q = load_factor(q_ptr + begin * q_token + head // group * q_head, row, length, column, width, q_token)
    k = load_factor(k_ptr + begin * k_token + head // group * k_head, row, length, column, width, k_token)
    beta = load_column(beta_ptr + begin * beta_token + head * beta_head, row, length, beta_token)
    _, _, _, between = load_decays(g_ptr + begin * g_token + head * g_head, row, length, g_token, ROWS)
    below = row[None, :] < row[:, None]
    a = tl.where(below, beta[:, None] * between * multiply(k, tl.trans(k), NARROW), 0.0)
    solved = solved_ptr + (tile * heads + head) * (2 * ROWS * ROWS) + square(ROWS)
    tl.store(solved, inverse(a, ROWS))
    tl.store(solved + ROWS * ROWS, between * multiply(q, tl.trans(k), NARROW))


@kernel(varying=("tokens", "heads", "group", "slices", "g_token", "beta_token"), fixed=("width", "columns"))
def gated_delta_rule_forward_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, solved_ptr, out_ptr, states_ptr, u_ptr,
    tokens, heads, group, width, columns, slices,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, beta_token, beta_head, scale,
    STATES: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One document, head of v and slice of its columns per program: the output, or if STATES what backward needs."""
    document = tl.program_id(0) // (slices * heads)
    head = (tl.program_id(0) // slices % heads).to(tl.int64)
    begin, length, first = find_document(cu_seqlens_ptr, document, tokens, ROWS)
    depth = tl.arange(0, WIDTH)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    k_ptr += begin * k_token + head // group * k_head
    q_ptr += begin * q_token + head // group * q_head
    v_ptr += begin * v_token + head * v_head
    g_ptr += begin * g_token + head * g_head
    beta_ptr += begin * beta_token + head * beta_head
    mine = (begin * heads + head) * columns
    state = tl.zeros([WIDTH, COLUMNS], tl.float32)
    for index in range(0, (length + ROWS - 1) // ROWS):
        row = index * ROWS + tl.arange(0, ROWS)
        chunk = (first + index) * heads + head
        if STATES:
            store_rows(states_ptr + chunk * width * columns, state, depth, width, column, columns, columns)
        k = load_factor(k_ptr, row, length, depth, width, k_token)
        v = load_rows(v_ptr, row, length, column, columns, v_token).to(tl.float32)
        beta = load_column(beta_ptr, row, length, beta_token)
        until, after, whole, _ = load_decays(g_ptr, row, length, g_token, ROWS)
        solved = solved_ptr + chunk * (2 * ROWS * ROWS) + square(ROWS)
        rest = beta[:, None] * (v - until[:, None] * multiply(k, state, NARROW))
        u = multiply(tl.load(solved), rest, NARROW)
        if STATES:
            store_rows(u_ptr + mine, u, row, length, column, columns, heads * columns)
        else:
            q = load_factor(q_ptr, row, length, depth, width, q_token)
            out = until[:, None] * multiply(q, state, NARROW) + multiply(tl.load(solved + ROWS * ROWS), u, NARROW)
            store_rows(out_ptr + mine, scale * out, row, length, column, columns, heads * columns)
        state = whole * state + multiply(tl.trans(k), after[:, None] * u, NARROW)


@kernel(varying=("tokens", "heads", "group", "slices", "g_token", "beta_token"), fixed=("width", "columns"))
def gated_delta_rule_backward_kernel(
    do_ptr, q_ptr, k_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, solved_ptr, dstates_ptr, db_ptr, dv_ptr,
    tokens, heads, group, width, columns, slices,
    do_token, do_head, q_token, q_head, k_token, k_head, g_token, g_head, beta_token, beta_head, scale,
    NARROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One document, head of v and slice of its columns per program, the last chunk first: dv, and each chunk's dS."""
    document = tl.program_id(0) // (slices * heads)
    head = (tl.program_id(0) // slices % heads).to(tl.int64)
    begin, length, first = find_document(cu_seqlens_ptr, document, tokens, ROWS)
    depth = tl.arange(0, WIDTH)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    do_ptr += begin * do_token + head * do_head
    q_ptr += begin * q_token + head // group * q_head
    k_ptr += begin * k_token + head // group * k_head
    g_ptr += begin * g_token + head * g_head
    beta_ptr += begin * beta_token + head * beta_head
    mine = (begin * heads + head) * columns
    dstate = tl.zeros([WIDTH, COLUMNS], tl.float32)
    chunks = (length + ROWS - 1) // ROWS
    for back in range(0, chunks):
        index = chunks - 1 - back
        row = index * ROWS + tl.arange(0, ROWS)
        chunk = (first + index) * heads + head
        store_rows(dstates_ptr + chunk * width * columns, dstate, depth, width, column, columns, columns)
        q = load_factor(q_ptr, row, length, depth, width, q_token)
        k = load_factor(k_ptr, row, length, depth, width, k_token)
        do = load_factor(do_ptr, row, length, column, columns, do_token)
        beta = load_column(beta_ptr, row, length, beta_token)
        until, after, whole, _ = load_decays(g_ptr, row, length, g_token, ROWS)
        solved = solved_ptr + chunk * (2 * ROWS * ROWS) + square(ROWS)
        du = scale * multiply(tl.trans(tl.load(solved + ROWS * ROWS)), do, NARROW)
        du += after[:, None] * multiply(k, dstate, NARROW)
        db = multiply(tl.trans(tl.load(solved)), du, NARROW)
        store_rows(db_ptr + mine, db, row, length, column, columns, heads * columns)
        dv = beta[:, None] * db
        store_rows(dv_ptr + mine, dv, row, length, column, columns, heads * columns)
        dstate = whole * dstate + multiply(tl.trans(q), (scale * until)[:, None] * do, NARROW)
        dstate -= multiply(tl.trans(k), until[:, None] * dv, NARROW)


@kernel(varying=("tokens", "documents", "heads", "group", "g_token", "beta_token"), fixed=("width", "columns"))
def gated_delta_rule_dg_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, states_ptr, dstates_ptr, u_ptr, db_ptr,
    pairs_ptr, dg_ptr, dbeta_ptr, tokens, documents, heads, group, width, columns,
    do_token, do_head, q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, beta_token, beta_head, scale,
    NARROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dg and dbeta of one chunk and head of v per program, and what pairs of tokens add to dq and dk."""
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS)
    if start >= length:
        return
    row = start + tl.arange(0, ROWS)
    depth = tl.arange(0, WIDTH)
    q = load_rows(q_ptr + begin * q_token + head // group * q_head, row, length, depth, width, q_token)
    k = load_rows(k_ptr + begin * k_token + head // group * k_head, row, length, depth, width, k_token)
    beta = load_column(beta_ptr + begin * beta_token + head * beta_head, row, length, beta_token)
    until, after, whole, between = load_decays(g_ptr + begin * g_token + head * g_head, row, length, g_token, ROWS)
    chunk = tile * heads + head
    mine = (begin * heads + head) * columns
    dp = tl.zeros([ROWS, ROWS], tl.float32)
    da = tl.zeros([ROWS, ROWS], tl.float32)
    dbeta = tl.zeros([ROWS], tl.float32)
    by_old = tl.zeros([ROWS], tl.float32)  # what the decays from the old state to a row contribute to dg
    by_new = tl.zeros([ROWS], tl.float32)  # those from a row to the new state
    through = 0.0  # that over the whole chunk
    for left in range(0, columns, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        state = load_factor(states_ptr + chunk * width * columns, depth, width, column, columns, columns)
        dstate = load_factor(dstates_ptr + chunk * width * columns, depth, width, column, columns, columns)
        u = load_factor(u_ptr + mine, row, length, column, columns, heads * columns)
        db = load_factor(db_ptr + mine, row, length, column, columns, heads * columns)
        v = load_factor(v_ptr + begin * v_token + head * v_head, row, length, column, columns, v_token)
        do = load_factor(do_ptr + begin * do_token + head * do_head, row, length, column, columns, do_token)
        dp += multiply(do, tl.trans(u), NARROW)
        da -= multiply(db, tl.trans(u), NARROW)
        known = until[:, None] * multiply(k, state, NARROW)
        dbeta += tl.sum(db * (v - known), 1)
        read = until[:, None] * multiply(q, state, NARROW)
        by_old += tl.sum(scale * do * read - beta[:, None] * db * known, 1)
        by_new += after * tl.sum(u * multiply(k, dstate, NARROW), 1)
        through += whole * tl.sum(tl.sum(state * dstate, 1), 0)
    below = row[None, :] < row[:, None]
    da = tl.where(below, da * between, 0.0)
    products = da * multiply(k, tl.trans(k), NARROW)
    dbeta += tl.sum(products, 1)
    da = da * beta[:, None]
    dp = scale * dp * between
    pairs = pairs_ptr + chunk * (2 * ROWS * ROWS) + square(ROWS)
    tl.store(pairs, dp)
    tl.store(pairs + ROWS * ROWS, da + tl.trans(da))
    # Row l of dg is the sum over all decays across l: of pairs i >= l > j, and of those above.
    across = tl.where(below, dp * multiply(q, tl.trans(k), NARROW), 0.0) + products * beta[:, None]
    across = tl.cumsum(across, 1) - across + by_old[:, None]
    dg = tl.sum(tl.where(row[None, :] <= row[:, None], across, 0.0), 0)
    dg += tl.cumsum(by_new, 0) - by_new + through
    place = (begin + row.to(tl.int64)) * heads + head
    tl.store(dg_ptr + place, dg.to(dg_ptr.dtype.element_ty), row < length)
    tl.store(dbeta_ptr + place, dbeta.to(dbeta_ptr.dtype.element_ty), row < length)


@kernel(varying=("tokens", "documents", "heads", "group", "g_token", "beta_token"), fixed=("width", "columns"))
def gated_delta_rule_dqdk_kernel(
    do_ptr, q_ptr, k_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, states_ptr, dstates_ptr, u_ptr, db_ptr, pairs_ptr,
    dq_ptr, dk_ptr, tokens, documents, heads, group, width, columns,
    do_token, do_head, q_token, q_head, k_token, k_head, g_token, g_head, beta_token, beta_head, scale,
    NARROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq and dk of one chunk and head of q per program."""
    kv_heads = heads // group
    tile = tl.program_id(0) // kv_heads
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS)
    if start >= length:
        return
    row = start + tl.arange(0, ROWS)
    depth = tl.arange(0, WIDTH)
    q = load_rows(q_ptr + begin * q_token + kv_head * q_head, row, length, depth, width, q_token)
    k = load_rows(k_ptr + begin * k_token + kv_head * k_head, row, length, depth, width, k_token)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    dk = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(0, group):
        head = kv_head * group + index
        chunk = tile * heads + head
        beta = load_column(beta_ptr + begin * beta_token + head * beta_head, row, length, beta_token)
        until, after, _, _ = load_decays(g_ptr + begin * g_token + head * g_head, row, length, g_token, ROWS)
        mine = (begin * heads + head) * columns
        for left in range(0, columns, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            state = load_rows(states_ptr + chunk * width * columns, depth, width, column, columns, columns)
            dstate = load_rows(dstates_ptr + chunk * width * columns, depth, width, column, columns, columns)
            u = load_factor(u_ptr + mine, row, length, column, columns, heads * columns)
            db = load_factor(db_ptr + mine, row, length, column, columns, heads * columns)
            do = load_factor(do_ptr + begin * do_token + head * do_head, row, length, column, columns, do_token)
            dq += multiply((scale * until)[:, None] * do, tl.trans(state), NARROW)
            dk -= multiply((until * beta)[:, None] * db, tl.trans(state), NARROW)
            dk += multiply(after[:, None] * u, tl.trans(dstate), NARROW)
        pairs = pairs_ptr + chunk * (2 * ROWS * ROWS) + square(ROWS)
        dp = tl.load(pairs)
        dq += multiply(dp, k, NARROW)
        dk += multiply(tl.trans(dp), q, NARROW) + multiply(tl.load(pairs + ROWS * ROWS), k, NARROW)
    mine = (begin * kv_heads + kv_head) * width
    store_rows(dq_ptr + mine, dq, row, length, depth, width, kv_heads * width)
    store_rows(dk_ptr + mine, dk, row, length, depth, width, kv_heads * width)
