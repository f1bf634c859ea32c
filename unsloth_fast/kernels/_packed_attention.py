"""The kernels of packed attention; packed_attention.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._cross_entropy import tanh, tanh_derivative
from unsloth_fast.kernels._launch import INTERPRETED, kernel

LOG2E = tl.constexpr(1.4426950408889634)
EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def find_tile(cu_seqlens_ptr, tile, documents, tokens, ROWS: tl.constexpr):
    """The first token of a tile's document, its length, and the position in it at which the tile begins.

    The tiles of document d begin with number cu_seqlens[d] // ROWS + d: as many as it needs, or one more.
    """
    low = 0
    high = documents - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = tl.load(cu_seqlens_ptr + middle) // ROWS + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    begin = tl.load(cu_seqlens_ptr + low)
    first = begin // ROWS + low
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + low + 1), 0), tokens)
    return begin.to(tl.int64), end - begin, (tile - first) * ROWS


@triton.jit
def find_queries(cu_seqlens_ptr, tiles, heads, documents, tokens, ROWS: tl.constexpr):
    """The head of a program, and what `find_tile` gives for its tile of queries; the last tiles come first."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    begin, length, start = find_tile(cu_seqlens_ptr, tiles - 1 - tl.program_id(0) // heads, documents, tokens, ROWS)
    return head, begin, length, start


@triton.jit
def load_rows(pointer, row, length, column, width, row_stride):
    """Load rows of a document [ROWS, WIDTH] for tl.dot, 0 outside of it."""
    offset = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :]
    values = tl.load(pointer + offset, (row < length)[:, None] & (column < width)[None, :], other=0.0)
    return values.to(tl.float32) if EMULATED else values  # the interpreter would multiply the bits of bfloat16


@triton.jit
def store_rows(pointer, values, row, length, column, width, row_stride):
    """Round and store rows of a document."""
    offset = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :]
    inside = (row < length)[:, None] & (column < width)[None, :]
    tl.store(pointer + offset, values.to(pointer.dtype.element_ty), inside)


@triton.jit
def exponents(dots, scale, softcap, SOFTCAP: tl.constexpr):
    """z of the dot products q . k, times log2(e) for exp2."""
    if SOFTCAP:
        return tanh(dots * (scale / softcap)) * (softcap * LOG2E)
    return dots * (scale * LOG2E)


@triton.jit
def visible(query, key, length, window, WINDOW: tl.constexpr):
    """Which keys the queries of a document see, [queries, keys]."""
    seen = (key[None, :] <= query[:, None]) & (query < length)[:, None]
    if WINDOW:
        seen &= key[None, :] > query[:, None] - window
    return seen


@triton.jit
def weights_and_slopes(
    q, k, v, do, lse, delta, query, key, length, window, partly, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Compute p and ds, [queries, keys], from recomputed scores of q and k.

    The branch pays: on an H200, masking tiles of which all queries see all keys would take a third of the instructions.
    """
    dots = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(exponents(dots, scale, softcap, SOFTCAP) - lse)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta)
    if SOFTCAP:
        ds *= tanh_derivative(dots * (scale / softcap))
    if partly:
        seen = visible(query, key, length, window, WINDOW)
        # Both are 0 for keys that are not seen, whatever their values.
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    return p, ds


@kernel(varying=("tokens", "documents", "tiles", "heads", "group", "window"), fixed=("width",))
def packed_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr, cu_seqlens_ptr,
    tokens, documents, tiles, heads, group, width,
    q_token, q_head, k_token, k_head, v_token, v_head,
    scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head per program; those with the most keys come first."""
    head, begin, length, start = find_queries(cu_seqlens_ptr, tiles, heads, documents, tokens, ROWS)
    if start >= length:
        return
    q_ptr += begin * q_token + head * q_head
    k_ptr += begin * k_token + head // group * k_head
    v_ptr += begin * v_token + head // group * v_head
    query = start + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    q = load_rows(q_ptr, query, length, column, width, q_token)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    if SINKS:
        highest = tl.full([ROWS], 0.0, tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    out = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    first = tl.maximum(start - window + 1, 0) // COLUMNS * COLUMNS if WINDOW else 0
    for key_start in range(first, tl.minimum(start + ROWS, length), COLUMNS):
        key = key_start + tl.arange(0, COLUMNS)
        k = load_rows(k_ptr, key, length, column, width, k_token)
        z = exponents(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        if (key_start + COLUMNS > start) | WINDOW:
            z = tl.where(visible(query, key, length, window, WINDOW), z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # for a row that has seen no key yet
        p = tl.exp2(z - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, key, length, column, width, v_token)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = higher
    total = tl.where(query < length, total, 1.0)  # other rows have seen no key
    out_ptr += (begin * heads + head) * width
    store_rows(out_ptr, out / total[:, None], query, length, column, width, heads * width)
    tl.store(lse_ptr + head * tokens + begin + query, highest + tl.log2(total), query < length)


@kernel(varying=("tokens", "documents", "tiles", "heads", "group", "window"), fixed=("width",))
def packed_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dsinks_ptr, cu_seqlens_ptr,
    tokens, documents, tiles, heads, group, width,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries of one head per program, their delta, the sum over D of out * do, and their part of dsink."""
    head, begin, length, start = find_queries(cu_seqlens_ptr, tiles, heads, documents, tokens, ROWS)
    if start >= length:
        return
    q_ptr += begin * q_token + head * q_head
    k_ptr += begin * k_token + head // group * k_head
    v_ptr += begin * v_token + head // group * v_head
    do_ptr += begin * do_token + head * do_head
    row_stride = heads * width
    mine = (begin * heads + head) * width
    query = start + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    q = load_rows(q_ptr, query, length, column, width, q_token)
    do = load_rows(do_ptr, query, length, column, width, do_token)
    out = load_rows(out_ptr + mine, query, length, column, width, row_stride)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + begin + query, delta, query < length)
    lse = tl.load(lse_ptr + head * tokens + begin + query, query < length, other=0.0)
    if SINKS:
        p = tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E - lse)
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(tl.where(query < length, p * delta, 0.0)))
    dq = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    first = tl.maximum(start - window + 1, 0) // COLUMNS * COLUMNS if WINDOW else 0
    for key_start in range(first, tl.minimum(start + ROWS, length), COLUMNS):
        key = key_start + tl.arange(0, COLUMNS)
        k = load_rows(k_ptr, key, length, column, width, k_token)
        v = load_rows(v_ptr, key, length, column, width, v_token)
        partly = (key_start + COLUMNS > start) | WINDOW | (WIDTH > 256)  # there the branch would spill 344 bytes
        _, ds = weights_and_slopes(
            q, k, v, do, lse[:, None], delta[:, None], query, key, length, window, partly, scale, softcap,
            SOFTCAP, WINDOW,
        )  # fmt: skip
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_rows(dq_ptr + mine, dq * scale, query, length, column, width, row_stride)


@kernel(varying=("tokens", "documents", "tiles", "heads", "group", "window"), fixed=("width",))
def packed_attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr,
    tokens, documents, tiles, heads, group, width,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dk and dv of COLUMNS keys of one head per program, summed over its group of query heads and their queries."""
    kv_heads = heads // group
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    tile = tl.program_id(0) // kv_heads
    begin, length, start = find_tile(cu_seqlens_ptr, tile, documents, tokens, COLUMNS)
    if start >= length:
        return
    key = start + tl.arange(0, COLUMNS)
    column = tl.arange(0, WIDTH)
    k = load_rows(k_ptr + begin * k_token + kv_head * k_head, key, length, column, width, k_token)
    v = load_rows(v_ptr + begin * v_token + kv_head * v_head, key, length, column, width, v_token)
    end = length
    if WINDOW:
        end = tl.minimum(length, start + COLUMNS + window - 1)
    dk = tl.full([COLUMNS, WIDTH], 0.0, tl.float32)
    dv = tl.full([COLUMNS, WIDTH], 0.0, tl.float32)
    for index in range(0, group):
        head = kv_head * group + index
        q_rows = q_ptr + begin * q_token + head * q_head
        do_rows = do_ptr + begin * do_token + head * do_head
        statistics = head * tokens + begin
        for query_start in range(start // ROWS * ROWS, end, ROWS):
            query = query_start + tl.arange(0, ROWS)
            q = load_rows(q_rows, query, length, column, width, q_token)
            do = load_rows(do_rows, query, length, column, width, do_token)
            lse = tl.load(lse_ptr + statistics + query, query < length, other=0.0)
            delta = tl.load(delta_ptr + statistics + query, query < length, other=0.0)
            partly = (start + COLUMNS - 1 > query_start) | (query_start + ROWS > length) | WINDOW
            p, ds = weights_and_slopes(
                q, k, v, do, lse[:, None], delta[:, None], query, key, length, window, partly, scale, softcap,
                SOFTCAP, WINDOW,
            )  # fmt: skip
            dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    mine, row_stride = (begin * kv_heads + kv_head) * width, kv_heads * width
    store_rows(dk_ptr + mine, dk * scale, key, length, column, width, row_stride)
    store_rows(dv_ptr + mine, dv, key, length, column, width, row_stride)
