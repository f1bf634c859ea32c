"""Wrong norms with a gate."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "gate_not_normalised_with_x": one("x if BEFORE else x * activation, activation", "x, activation", "one_at_a_time"),
    "gate_dropped": one("        y *= activation\n", "        y *= 1.0\n", "value"),
    "mean_over_all_groups": one(
        "quotient(tl.sum(squares, 1, keep_dims=True), size)",
        "quotient(tl.sum(squares, 1, keep_dims=True), size * groups)",
        "value",
    ),
    "weight_of_the_first_group": one(
        "    weight_ptr += group * size * weight_stride\n    y_ptr", "    y_ptr", "value", "gradients"
    ),
    "eps_hard_coded": one("mean + eps", "mean + 1e-6", "one_at_a_time"),
    "slope_without_its_second_term": one(
        "gate * share, share * (1.0 + gate * complement)", "gate * share, share", "gradients"
    ),
    "dgate_without_the_weight": one(
        "dy * (rounded(n, dtype, LLAMA) * scale) * slope", "dy * rounded(n, dtype, LLAMA) * slope", "gradients"
    ),
    "dx_without_the_activation": one(
        "return dv * activation, dv * x * slope", "return dv, dv * x * slope", "one_at_a_time"
    ),
    "dweight_without_the_activation": one("of_product = dy * activation", "of_product = dy", "gradients"),
    "gradient_mean_scaled": one(
        "tl.sum(g * n, 1, keep_dims=True), size)", "tl.sum(g * n, 1, keep_dims=True), size) * 1.03", "gradients"
    ),
    "long_groups_cut_short": one(
        "range(COLUMNS, size, COLUMNS)", "range(COLUMNS, size - COLUMNS + 1, COLUMNS)", "extents"
    ),
    "long_partial_sums_not_added": Mutant(
        (("BackwardTile(1, 4096, 0, 8, 256)", "BackwardTile(1, 4096, 0, 8, 1)"), ("before + of_product", "of_product")),
        ("extents",),
    ),
    "stored_past_the_end": one(
        "dgate.to(dtype), inside)\n            if NEED_DWEIGHT:\n                dweight +=",
        "dgate.to(dtype), (row < rows) & (column <= size))\n            if NEED_DWEIGHT:\n                dweight +=",
        "guard_writes",
    ),
    "gate_read_as_x_lies": one(
        "rows, groups, size, *x.stride(), *gate.stride()", "rows, groups, size, *x.stride(), *x.stride()", "layouts"
    ),
    "needs_exchanged": one("((x, need_dx), (gate, need_dgate)", "((x, need_dgate), (gate, need_dx)", "gradients"),
    "gate_of_any_shape": one("checks.gated_norm_arguments(x, gate, weight, eps, group_size)", "pass", "error_parity"),
    "sigmoid_flushed_to_0": one(
        "tl.exp(-tl.abs(x))", "tl.exp2(tl.abs(x) * -1.4426950408889634)", "value", "gradients", "one_at_a_time"
    ),
    "groups_of_32_by_default": one(
        "group_size or x.shape[-1],", "group_size or min(32, x.shape[-1]),", "argument_kinds"
    ),
    "dweight_of_the_last_rows": one(
        "                dweight += of_product * rounded(n,",
        "                dweight = of_product * rounded(n,",
        "extents",
    ),
    "second_derivative_zero": one(*LYING),
}
