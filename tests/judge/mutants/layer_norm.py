"""Wrong layer norms."""

from tests.judge.mutants.mutant import LYING, Mutant, one
from tests.judge.mutants.rms_norm import ONE_PROGRAM

TABLE = {
    "variance_as_a_difference": Mutant(
        (
            ("deviation = centred(xs[part], mean, at, columns, EXACT or part + 1 < PARTS)", "deviation = xs[part]"),
            ("deviation = centred(x, mean, start + column, columns, False)", "deviation = x"),
            (
                "variance = quotient(tl.sum(squares, 1, keep_dims=True), columns)",
                "variance = quotient(tl.sum(squares, 1, keep_dims=True), columns) - mean * mean",
            ),
        ),
        ("one_at_a_time",),
    ),
    "variance_of_a_sample": one(
        "variance = quotient(tl.sum(squares, 1, keep_dims=True), columns)",
        "variance = quotient(tl.sum(squares, 1, keep_dims=True), tl.maximum(columns - 1, 1))",
        "value",
    ),
    "variance_of_the_whole_tile": one("(mean if FULL else tl.where(column < columns, mean, 0.0))", "mean", "value"),
    "variance_of_all_but_the_last_part": one(
        "squares += deviation * deviation\n    rstd = store_stats(stats_ptr, mean, squares, eps, row, rows, columns)\n"
        "    for part",
        "squares += deviation * deviation * (part + 1 < PARTS or PARTS == 1)\n"
        "    rstd = store_stats(stats_ptr, mean, squares, eps, row, rows, columns)\n    for part",
        "extents",
    ),
    "mean_forgotten_in_long_rows": one(
        "store_normed(\n            y_ptr, x, mean, rstd",
        "store_normed(\n            y_ptr, x, mean * 0, rstd",
        "extents",
    ),
    "eps_outside_the_root": one("tl.sqrt_rn(variance + eps)", "(tl.sqrt_rn(variance) + eps)", "value"),
    "eps_hard_coded": one("variance + eps", "variance + 1e-5", "value"),
    "bias_forgotten": one("y = (x - mean) * rstd * weight + bias", "y = (x - mean) * rstd * weight", "value"),
    "bias_read_as_the_weight_lies": one(
        "*weight.stride(), *bias.stride(), eps", "*weight.stride(), *weight.stride(), eps", "layouts"
    ),
    "dx_without_the_mean_of_g": one(
        "dx = rstd * (gs[part] - shift - normed[part] * slope)",
        "dx = rstd * (gs[part] - normed[part] * slope)",
        "gradients",
    ),
    "dx_without_the_part_along_the_row": one(
        "dx = rstd * (gs[part] - shift - normed[part] * slope)", "dx = rstd * (gs[part] - shift)", "gradients"
    ),
    "mean_of_g_of_the_last_part": one("sums += g\n            products", "sums = g\n            products", "extents"),
    "weight_of_the_first_part": one("weights[part]", "weights[0]", "extents"),
    "dbias_of_the_last_tile": Mutant(
        (ONE_PROGRAM, ("dbias[part] + tl.sum(dy, 0,", "tl.sum(dy, 0,")),
        ("extents",),
    ),
    "dweight_in_the_place_of_dbias": one("column_sum(partial_ptr + columns,", "column_sum(partial_ptr,", "gradients"),
    "dbias_lost_with_a_frozen_weight": one("need_dweight or need_dbias", "need_dweight", "gradients"),
    "stats_overlap": one("tl.store(stats_ptr + rows + row", "tl.store(stats_ptr + rows - 1 + row", "gradients"),
    "sums_of_long_rows_from_one": one(
        "before = tl.load(partial, earlier, other=0.0)", "before = tl.load(partial, earlier, other=1.0)", "extents"
    ),
    "bias_of_any_size": one('checks.column_vector("bias", bias, "x", x)', "pass", "error_parity"),
    "second_derivative_zero": one(*LYING),
}
