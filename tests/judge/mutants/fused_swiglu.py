"""Wrong gated activations of one tensor."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "halves_exchanged": one("return gate.to(tl.float32), up", "return up.to(tl.float32), gate", "value"),
    "alpha_outside_the_sigmoid_too": one("y = gate * share * (up", "y = gate * ALPHA * share * (up", "one_at_a_time"),
    "alpha_missing_in_the_derivative": one(
        "dy * (up + OFFSET) * slope", "dy * (up + OFFSET) * (share + (slope - share) / ALPHA)", "one_at_a_time"
    ),
    "gate_clamped_below_too": one(
        "gate = tl.where(gate > LIMIT, LIMIT, gate)",
        "gate = tl.where(gate > LIMIT, LIMIT, tl.where(gate < -LIMIT, -LIMIT, gate))",
        "one_at_a_time",
    ),
    "up_not_clamped_below": one("tl.where(up < -LIMIT, -LIMIT, up)", "up", "one_at_a_time"),
    "nan_clamped": one(
        "gate = tl.where(gate > LIMIT, LIMIT, gate)", "gate = tl.where(gate <= LIMIT, gate, LIMIT)", "special_values"
    ),
    "gradient_through_the_clamp": one("dgate = tl.where(gate <= LIMIT, dgate, 0.0)", "pass", "one_at_a_time"),
    "gradient_through_the_lower_clamp": one("(up <= LIMIT) & (up >= -LIMIT)", "(up <= LIMIT)", "one_at_a_time"),
    "offset_missing_in_dgate": one("dy * (up + OFFSET) * slope", "dy * up * slope", "one_at_a_time"),
    "offset_before_the_clamp": one(
        "up = tl.where(up > LIMIT, LIMIT, tl", "up += 1.0\n        up = tl.where(up > LIMIT, LIMIT, tl", "one_at_a_time"
    ),
    "gradient_stored_past_the_end": one(
        "tl.store(rows_ptr + both, joined, inside_rows & (both < 2 * columns))",
        "tl.store(rows_ptr + both, joined, inside_rows & (both <= 2 * columns))",
        "guard_writes",
    ),
    "rows_read_as_contiguous": one(
        "*of_y.shape, tiles_per_row, *gate_up.stride(),",
        "*of_y.shape, tiles_per_row, gate_up.shape[1], 1,",
        "layouts",
    ),
    "offsets_in_32_bits": one(
        "gate_in, up_in = load_gate_and_up(\n        gate_up_ptr + row * gate_up_row,",
        "gate_in, up_in = load_gate_and_up(\n        gate_up_ptr + (row * gate_up_row).to(tl.int32),",
        "int64_offsets",
    ),
    "odd_columns_dropped": one("checks.fused_gated_arguments(gate_up, alpha, limit, offset)", "pass", "error_parity"),
    "limit_of_0_taken_for_none": Mutant(
        (
            ("    if LIMIT is not None:\n        gate =", "    if LIMIT:\n        gate ="),
            ("    if LIMIT is not None:\n        dgate", "    if LIMIT:\n        dgate"),
        ),
        ("one_at_a_time",),
    ),
    "alpha_of_0_taken_for_1": one(
        "ctx.options = interleaved, alpha, limit, offset\n",
        "ctx.options = interleaved, alpha or 1.0, limit, offset\n",
        "one_at_a_time",
    ),
    "second_derivative_zero": one(*LYING),
}
