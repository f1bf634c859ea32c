"""Wrong gated delta rules."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "state_that_is_not_zero": one(
        "state = tl.zeros([WIDTH, COLUMNS], tl.float32)\n    for index",
        "state = tl.full([WIDTH, COLUMNS], 0.1, tl.float32)\n    for index",
        "value",
    ),
    "documents_run_on": one(
        "end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + document + 1), 0), tokens)",
        "end = tokens + 0 * begin",
        "argument_kinds",
    ),
    "heads_share_by_remainder": one(
        "load_factor(q_ptr + begin * q_token + head // group * q_head, row",
        "load_factor(q_ptr + begin * q_token + head % (heads // group) * q_head, row",
        "extents",
    ),
    "state_not_decayed": one("state = whole * state +", "state = state +", "extents"),
    "correction_by_later_tokens_alone": one(
        "below = row[None, :] < row[:, None]\n    a =", "below = row[None, :] + 1 < row[:, None]\n    a =", "value"
    ),
    "inverse_of_blocks_alone": one("    if BLOCKS > 1:\n", "    if BLOCKS > 8:\n", "extents"),
    "substitution_ends_early": one("for step in range(1, 16)", "for step in range(1, 15)", "extents"),
    "scale_forgotten_in_dq": one(
        "multiply((scale * until)[:, None] * do, tl.trans(state)",
        "multiply(until[:, None] * do, tl.trans(state)",
        "extents",
    ),
    "dstate_without_the_correction": one(
        "dstate -= multiply(tl.trans(k), until[:, None] * dv, NARROW)", "dstate -= 0.0", "extents"
    ),
    "inverse_not_transposed": one(
        "db = multiply(tl.trans(tl.load(solved)), du,", "db = multiply(tl.load(solved), du,", "gradients"
    ),
    "dk_of_the_first_head": one(
        "for index in range(0, group):\n        head = kv_head * group + index\n        chunk",
        "for index in range(0, 1):\n        head = kv_head * group + index\n        chunk",
        "extents",
    ),
    "dk_of_one_side": one("da + tl.trans(da))", "da)", "gradients"),
    "dbeta_without_the_keys": one("dbeta += tl.sum(products, 1)", "dbeta += 0.0", "gradients"),
    "dg_of_earlier_rows": one(
        "tl.where(row[None, :] <= row[:, None], across, 0.0)",
        "tl.where(row[None, :] < row[:, None], across, 0.0)",
        "gradients",
    ),
    "grad_output_read_as_v_lies": one(
        "strides_of(do, c.q, c.k, c.v, g, beta)", "strides_of(c.v, c.q, c.k, c.v, g, beta)", "layouts"
    ),
    "documents_of_any_kind": one('document_checks.documents_cover(cu_seqlens, len(q), "q")', "pass", "error_parity"),
    "scale_of_0_taken_for_none": one("if scale is None else scale", "if not scale else scale", "one_at_a_time"),
    "beta_of_at_most_1": one(
        "rest = beta[:, None] * (v", "rest = tl.minimum(beta, 1.0)[:, None] * (v", "argument_kinds"
    ),
    "chunks_of_seven_documents_apart": one(
        "(begin // ROWS + document).to(tl.int64)",
        "(begin // ROWS + tl.minimum(document, 6)).to(tl.int64)",
        "argument_kinds",
    ),
    "second_derivative_zero": one(*LYING),
}
