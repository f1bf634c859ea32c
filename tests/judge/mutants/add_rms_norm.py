"""Wrong residual additions with a norm."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "residual_subtracted": one("return (x + residual)", "return (x - residual)", "value"),
    "squares_in_float16": one(
        "squares = total * total", "squares = (total * total).to(dtype).to(tl.float32)", "value", dtype="float16"
    ),
    "eps_outside_the_root": one(
        "rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))\n    tl.store(rstd_ptr + row, rstd, row < rows)\n"
        "    if WHOLE:\n        inside",
        "rstd = tl.div_rn(1.0, tl.sqrt_rn(mean) + eps)\n    tl.store(rstd_ptr + row, rstd, row < rows)\n"
        "    if WHOLE:\n        inside",
        "value",
    ),
    "norm_of_x_in_long_rows": one(
        "total = load_sum(\n                x_ptr, residual_ptr, row, start + column, rows, columns, x_row, x_column, "
        "residual_row,\n                residual_column, dtype,\n            )  # fmt: skip\n            squares",
        "total = load_tile(x_ptr, row, start + column, rows, columns, x_row, x_column)\n            squares",
        "extents",
    ),
    "gradient_of_the_sum_alone_doubled": one("dx, dweight = dsum, None", "dx, dweight = 2 * dsum, None", "gradients"),
    "residual_read_as_x_lies": one(
        "columns, *x.stride(), *residual.stride()", "columns, *x.stride(), *x.stride()", "layouts"
    ),
    "gradient_of_the_sum_lost": one("dx += load_tile(dsum_ptr, row, at,", "load_tile(dsum_ptr, row, at,", "gradients"),
    "gradient_of_the_sum_lost_in_long_rows": one(
        "dx += load_tile(dsum_ptr, row, start + column,", "load_tile(dsum_ptr, row, start + column,", "extents"
    ),
    "gradient_of_the_sum_read_as_the_other_lies": one(
        "*dsum.stride(), *x.stride(), *weight.stride())", "*dy.stride(), *x.stride(), *weight.stride())", "layouts"
    ),
    "gradient_of_the_sum_normalised": one(
        "dx += load_tile(dsum_ptr, row, at,",
        "dx += rstd * load_tile(dsum_ptr, row, at,",
        "gradients",
    ),
    "residual_without_its_gradient_where_x_is_frozen": one(
        "dx if need_residual else None", "dx if need_x else None", "gradients"
    ),
    "sum_over_x": one("        return normed, total\n", "        return normed, x.copy_(total)\n", "inputs_untouched"),
    "residual_of_any_size": one('checks.same("residual", residual, "x", x)', "pass", "error_parity"),
    "second_derivative_zero": one(*LYING),
}
