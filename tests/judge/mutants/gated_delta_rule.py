"""Wrong gated delta rules."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "state_carried_over": one(
        "state = tl.zeros([WIDTH, COLUMNS], tl.float32)\n    for index",
        "state = tl.full([WIDTH, COLUMNS], 0.1, tl.float32)\n    for index",
        "value",
    ),
    "documents_run_on": one(
        "end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + document + 1), 0), tokens)",
        "end = tokens + 0 * begin",
        "value",
        "guard_writes",
    ),
    "heads_share_by_remainder": one(
        "q_ptr += begin * q_token + head // group * q_head\n    v_ptr",
        "q_ptr += begin * q_token + head % (heads // group) * q_head\n    v_ptr",
        "value",
        "extents",
    ),
    "decay_forgotten": one("state = whole * state +", "state = state +", "extents", "value"),
    "decay_of_one_token_more": one(
        "below = row[None, :] < row[:, None]\n    a =", "below = row[None, :] + 1 < row[:, None]\n    a =", "value"
    ),
    "correction_forgotten": one("(v - until[:, None] * multiply(k, state, WIDE))\n        u", "v\n        u", "extents", "value"),
    "inverse_of_blocks_alone": one("    if BLOCKS > 1:\n", "    if BLOCKS > 8:\n", "extents", "value"),
    "inverse_to_first_order": one("        if BLOCKS > 2:\n", "        if BLOCKS > 8:\n", "extents", "value", dtype="float16"),
    "substitution_ends_early": one("for step in range(1, 16)", "for step in range(1, 15)", "extents", "value"),
    "output_from_the_new_state": one(
        "out = until[:, None] * multiply(q, state, WIDE)",
        "state = whole * state + multiply(tl.trans(after[:, None] * k), u, WIDE)\n            out = multiply(q, state, WIDE)",
        "value",
    ),
    "scale_forgotten_in_dq": one(
        "do = scale * load_rows(do_rows", "do = 1.0 * load_rows(do_rows", "gradients"
    ),
    "dstate_not_decayed": one("dstate = whole * dstate +", "dstate = dstate +", "extents", "gradients"),
    "dstate_without_the_correction": one(
        "dstate -= multiply(tl.trans(until[:, None] * k), dv, WIDE)", "dstate -= 0.0", "extents", "gradients"
    ),
    "first_chunk_before_the_last": one("index = chunks - 1 - back", "index = back", "extents", "gradients"),
    "inverse_not_transposed": one(
        "db = multiply(tl.trans(tl.load(solved)), du, WIDE)", "db = multiply(tl.load(solved), du, WIDE)", "gradients"
    ),
    "dk_of_the_first_head": one("for index in range(0, group):\n        head = kv_head * group + index\n        chunk", "for index in range(0, 1):\n        head = kv_head * group + index\n        chunk", "gradients", "extents"),
    "dk_of_one_side": one("multiply(da + tl.trans(da), k, WIDE)", "multiply(da, k, WIDE)", "gradients"),
    "dbeta_without_the_keys": one("dbeta += tl.sum(products, 1)", "dbeta += 0.0", "gradients"),
    "dg_of_earlier_rows": one(
        "tl.where(row[None, :] <= row[:, None], across, 0.0)", "tl.where(row[None, :] < row[:, None], across, 0.0)", "gradients"
    ),
    "dg_without_the_state": one("dg += tl.sum(before * by_new[:, None], 0) + through", "dg += 0.0", "extents", "gradients"),
    "neighbour_read": one("row < length, other=0.0).to(tl.float32)\n\n\n@triton.jit\ndef load_decays", "row <= length, other=0.0).to(tl.float32)\n\n\n@triton.jit\ndef load_decays", "guard_reads", "argument_kinds", "batch_invariance"),
    "heads_in_32_bits": one(
        "head = (tl.program_id(0) // slices % heads).to(tl.int64)\n    begin, length, first = find_document(cu_seqlens_ptr, document, tokens, ROWS)\n    depth = tl.arange(0, WIDTH)\n    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)\n    k_ptr",
        "head = tl.program_id(0) // slices % heads\n    begin, length, first = find_document(cu_seqlens_ptr, document, tokens, ROWS)\n    depth = tl.arange(0, WIDTH)\n    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)\n    k_ptr",
        "int64_offsets",
    ),
    "g_read_as_beta_lies": one(
        "*strides_of(do, c.q, c.k, g, beta), scale", "*strides_of(do, c.q, c.k, beta, beta), scale", "layouts", "gradients"
    ),
    "one_chunk_too_few": one(
        'tokens // self.tile["ROWS"] + documents', 'tokens // self.tile["ROWS"] + documents - 1', "guard_writes", "value", "uninitialised"
    ),
    "numbers_of_one_half": Mutant(
        (("if WIDE or EMULATED:\n        return tl.dot(a, b,", "if WIDE or EMULATED:\n        return tl.dot(a.to(tl.float16).to(tl.float32), b,"),),
        ("value", "gradients"),
    ),
    "documents_of_any_kind": one('checks.documents_cover(cu_seqlens, len(q), "q")', "pass", "error_parity"),
    "second_derivative_zero": one(*LYING),
}
