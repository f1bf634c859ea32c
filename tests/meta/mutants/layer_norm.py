"""Layer norms that are wrong."""

from tests.meta.mutants.mutant import LYING, Mutant, one

TABLE = {
    "variance_as_a_difference": one(
        "variance = quotient(tl.sum(squares, 1, keep_dims=True), columns)",
        "variance = quotient(tl.sum(tl.where(column < columns, (x + mean) * (x + mean), 0.0), 1, keep_dims=True), "
        "columns) - mean * mean",
        "one_at_a_time",
    ),
    "variance_of_a_sample": one(
        "variance = quotient(tl.sum(squares, 1, keep_dims=True), columns)",
        "variance = quotient(tl.sum(squares, 1, keep_dims=True), tl.maximum(columns - 1, 1))",
        "value",
    ),
    "variance_of_the_whole_tile": one(
        "return tl.where((row < rows) & (column < columns), x - mean, 0.0)", "return x - mean", "value"
    ),
    "mean_forgotten_in_long_rows": one(
        "rows, columns, x_row, x_column) - mean) * rstd\n            weight",
        "rows, columns, x_row, x_column)) * rstd\n            weight",
        "extents",
    ),
    "eps_outside_the_root": one("tl.sqrt_rn(variance + eps)", "(tl.sqrt_rn(variance) + eps)", "value"),
    "eps_hard_coded": one("variance + eps", "variance + 1e-5", "value"),
    "bias_forgotten": one(
        "y = x * rstd * weight + load_vector(bias_ptr, column, columns, bias_stride)", "y = x * rstd * weight", "value"
    ),
    "bias_read_as_the_weight_lies": one(
        "*weight.stride(), *bias.stride(), eps", "*weight.stride(), *weight.stride(), eps", "layouts"
    ),
    "dx_without_the_mean_of_g": one(
        "dx = rstd * (g - shift - normed * slope)\n    inside",
        "dx = rstd * (g - normed * slope)\n    inside",
        "gradients",
    ),
    "dx_without_the_part_along_the_row": one(
        "dx = rstd * (g - shift - normed * slope)\n    inside",
        "dx = rstd * (g - shift)\n    inside",
        "gradients",
    ),
    "mean_of_g_without_the_rest": one("sums += tl.sum(g_2, 1, keep_dims=True)", "pass", "extents"),
    "normed_of_the_rest_not_centred": one(
        "x_row, x_column) - mean) * rstd\n        if NEED_SUMS",
        "x_row, x_column)) * rstd\n        if NEED_SUMS",
        "extents",
    ),
    "dbias_of_the_last_tile": Mutant(
        (
            ("128 * held", "1"),
            ("dbias += tl.sum(dy, 0,", "dbias = tl.sum(dy, 0,"),
        ),
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
