"""Wrong scans of Mamba 2."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "state_that_is_not_zero": one(
        "state = tl.zeros([COLUMNS, WIDTH], tl.float32)", "state = tl.full([COLUMNS, WIDTH], 0.1, tl.float32)", "value"
    ),
    "one_state_per_document": one(
        "first + index) * heads + head) * col", "first + 0 * index) * heads + head) * col", "extents"
    ),
    "state_not_decayed": one("state = tl.exp(last) * state +", "state = state +", "extents"),
    "state_without_dt": one(
        "tl.exp(last - total) * dt\n        x = load_rows", "tl.exp(last - total)\n        x = load_rows", "extents"
    ),
    "heads_share_by_remainder": one(
        "c_ptr += begin * c_token + head // group * c_head\n    states_ptr += (tile",
        "c_ptr += begin * c_token + head % (heads // group) * c_head\n    states_ptr += (tile",
        "extents",
    ),
    "a_token_does_not_see_itself": one(
        "lower = place[None, :] <= place[:, None]\n    return tl.where(lower, tl.exp(",
        "lower = place[None, :] < place[:, None]\n    return tl.where(lower, tl.exp(",
        "value",
    ),
    "d_forgotten": one(" + tl.load(d_ptr + head).to(tl.float32) * x.to(tl.float32)", "", "value"),
    "old_state_read_without_decay": one("y = tl.exp(total)[:, None] * y + multiply", "y = y + multiply", "extents"),
    "dx_without_later_chunks": one(
        "(multiply(tl.trans(factor), dy) + new)", "multiply(tl.trans(factor), dy)", "extents"
    ),
    "dx_without_d": one(" + d * dy.to(tl.float32)", "", "gradients"),
    "dg_of_earlier_rows": one(
        "until = tl.where(row[None, :] <= row[:, None], 1.0, 0.0)",
        "until = tl.where(row[None, :] < row[:, None], 1.0, 0.0)",
        "gradients",
    ),
    "dg_without_the_old_state": one(
        "tl.sum(until * (tl.exp(total) * by_old)[:, None], 0) + tl.exp(last) * through",
        "tl.exp(last) * through",
        "extents",
    ),
    "dg_without_the_whole_chunk": one(" + tl.exp(last) * through", "", "extents"),
    "ddt_of_the_decay_alone": one("ddt += by_new + a * dg", "ddt = a * dg", "gradients"),
    "da_without_steps": one("tl.store(da_ptr + place, dt * dg,", "tl.store(da_ptr + place, dg,", "gradients"),
    "db_of_the_first_head": one("mine = tl.minimum(HEADS, group - split * HEADS)", "mine = 1", "extents"),
    "db_of_heads_of_another_group": one("mine = tl.minimum(HEADS, group - split * HEADS)", "mine = HEADS", "extents"),
    "sums_of_the_first_part_twice": one("        db_parts_ptr += size\n", "", "extents"),
    "db_not_transposed": one("db += multiply(tl.trans(weights), c)", "db += multiply(weights, c)", "gradients"),
    "dc_without_the_old_state": one("dc += until * multiply(dy,", "dc += 0.0 * multiply(dy,", "extents"),
    "grad_output_read_as_x_lies": one(
        "strides = strides_of(dy, s.x, dt, s.b, s.c)", "strides = strides_of(s.x, s.x, dt, s.b, s.c)", "layouts"
    ),
    "documents_of_any_kind": one('document_checks.documents_cover(cu_seqlens, len(x), "x")', "pass", "error_parity"),
    "rates_of_at_most_4": one(
        "a = tl.load(a_ptr + head).to(tl.float32)\n    state",
        "a = tl.maximum(tl.load(a_ptr + head).to(tl.float32), -4.0)\n    state",
        "extents",
    ),
    "second_derivative_zero": one(*LYING),
}
