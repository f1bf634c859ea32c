"""Wrong rotary position embeddings."""

from tests.judge.mutants.mutant import Mutant, one

TABLE = {
    "turned_the_other_way": one("if TRANSPOSED:", "if not TRANSPOSED:", "value"),
    "gradient_turned_forward": one("not ctx.transposed, ctx", "ctx.transposed, ctx", "gradients"),
    "halves_taken_for_equal": one("second * cos2 + first * sin2", "second * cos1 + first * sin1", "argument_kinds"),
    "gradient_of_equal_halves": one("sin1, sin2 = -sin2, -sin1", "sin1, sin2 = -sin1, -sin2", "argument_kinds"),
    "halves_rotated_for_neighbours": one("INTERLEAVED=interleaved", "INTERLEAVED=False", "one_at_a_time"),
    "neighbours_exchanged": one("tl.join(rotated1, rotated2)", "tl.join(rotated2, rotated1)", "one_at_a_time"),
    "gradient_of_halves_for_neighbours": one(
        "positions, ctx.interleaved, not", "positions, False, not", "one_at_a_time"
    ),
    "half_of_the_neighbours": one(
        "inside = head_inside & (column // UNIT < 2 * units)",
        "inside = head_inside & (column // UNIT < units)",
        "one_at_a_time",
    ),
    "neighbours_stored_over_the_rest": one(
        "tl.store(out_ptr + column, both, head_inside & (column // UNIT < 2 * units))",
        "tl.store(out_ptr + column, both, head_inside & (column // UNIT <= 2 * units))",
        "guard_writes",
    ),
    "nothing_without_heads_of_both": one(
        "if q_out.numel() + k_out.numel() == 0", "if q_out.numel() * k_out.numel() == 0", "argument_kinds"
    ),
    "position_is_the_row": one("row = tl.load(positions_ptr", "row = token + 0 * tl.load(positions_ptr", "value"),
    "first_sequence_for_all": one(
        "cos_ptr += batch * cos_batch", "cos_ptr += 0 * cos_batch", "value", "changed_inputs"
    ),
    "shared_angles_read_past": one("(0, *s[1:]) if len(cos) == 1 and", "s if len(cos) == 1 and", "argument_kinds"),
    "shared_positions_read_past": one(
        "positions.stride(0) if len(positions) > 1 else 0", "positions.shape[1]", "argument_kinds"
    ),
    "sin_in_float16": one("sin2.to(tl.float32)", "sin2.to(tl.float16).to(tl.float32)", "value"),
    "rest_left_unwritten": one(
        "            store_rotated(q_outs, q1, q2, q_known, column, units, cos1, cos2, sin1, sin2, UNIT, INTERLEAVED)\n"
        "            if REST:",
        "            store_rotated(q_outs, q1, q2, q_known, column, units, cos1, cos2, sin1, sin2, UNIT, INTERLEAVED)\n"
        "            if REST > 64:",
        "uninitialised",
    ),
    "no_more_keys_than_queries": one(
        "(0 if t is None else t.shape[1] for t in (q, k))",
        "(0 if t is None else min(t.shape[1], x.shape[1]) for t in (q, k))",
        "value",
    ),
    "as_many_steps_as_queries_need": one(
        "steps = max(cdiv(q_heads, q_tile) if q_tile else 0, cdiv(k_heads, k_tile) if k_tile else 0)",
        "steps = cdiv(q_heads, q_tile) if q_tile else cdiv(k_heads, k_tile)",
        "argument_kinds",
    ),
    "stored_a_head_too_many": Mutant(
        (
            ("q_known = head < q_heads", "q_known, q_stored = head < q_heads, head <= q_heads"),
            ("store_rotated(q_outs, q1, q2, q_known,", "store_rotated(q_outs, q1, q2, q_stored,"),
        ),
        ("guard_writes",),
    ),
    "k_read_as_q_lies": one(
        "*(x if k is None else k).stride(), *strides", "*(x if q is None else q).stride(), *strides", "layouts"
    ),
    "columns_read_as_neighbours": one(
        "first = tl.load(row_ptr + column * column_stride", "first = tl.load(row_ptr + column", "layouts"
    ),
    "heads_in_32_bits": one(
        "k_ptr += batch * k_batch + token * k_token",
        "k_ptr += (batch * k_batch).to(tl.int32) + token * k_token",
        "int64_offsets",
    ),
    "k_lost_with_a_frozen_q": one("if dq is None and dk is None:", "if dq is None:", "gradients"),
    "position_outside_gives_nan": one("checks.positions_in_table(positions, len(cos))", "pass", "error_parity"),
    "fake_of_another_layout": one(
        "    def allocated(x: Tensor | None) -> Tensor:\n",
        "    token_major &= type(cos) is Tensor\n\n    def allocated(x: Tensor | None) -> Tensor:\n",
        "opcheck",
    ),
}
