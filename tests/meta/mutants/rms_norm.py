"""Root-mean-square norms that are wrong."""

from tests.meta.mutants.mutant import LYING, Mutant, one

TABLE = {
    "neighbours_columns_read": one(
        "inside = (row < rows) & (column < columns)\n    return",
        "inside = (row < rows) & (column < 2 * columns)\n    return",
        "value",
    ),
    "stored_past_the_end": one(
        "dx.to(dx_ptr.dtype.element_ty), inside)",
        "dx.to(dx_ptr.dtype.element_ty), (row < rows) & (column <= columns))",
        "guard_writes",
    ),
    "one_row_too_many_read": one(  # it meets zeros of dy: NaN alone shows
        "x = load_tile(x_ptr, row, column, rows, columns, x_row, x_column)\n        rstd",
        "x = load_tile(x_ptr, row, column, rows + 1, columns, x_row, x_column)\n        rstd",
        "guard_reads",
    ),
    "eps_outside_the_root": one("tl.sqrt_rn(mean + eps)", "(tl.sqrt_rn(mean) + eps)", "value"),
    "eps_hard_coded": one("mean + eps", "mean + 1e-6", "value"),
    "mean_over_one_less": one(
        "quotient(tl.sum(squares, 1, keep_dims=True), columns)",
        "quotient(tl.sum(squares, 1, keep_dims=True), columns - 1)",
        "value",
    ),
    "weight_one_column_off": one(
        "weight_ptr + column * weight_stride, column < columns",
        "weight_ptr + (column + 1) * weight_stride, column + 1 < columns",
        "value",
    ),
    "weight_read_as_contiguous": one("weight_ptr + column * weight_stride", "weight_ptr + column", "layouts"),
    "offset_ignored": one("weight + OFFSET if OFFSET != 0 else weight", "weight", "value"),
    "squares_in_float16": one(
        "squares = x * x", "squares = (x * x).to(dtype).to(tl.float32)", "value", dtype="float16"
    ),
    "gradient_mean_scaled": one(
        "mean = quotient(total, columns)", "mean = quotient(total, columns) * 1.03", "gradients"
    ),
    "gradient_mean_without_the_rest": one("total += tl.sum(g_2 * normed_2, 1, keep_dims=True)", "pass", "extents"),
    "dweight_of_the_last_rest": Mutant(
        (("128 * held", "1"), ("dweight_2 += tl.sum(", "dweight_2 = tl.sum(")), ("extents",)
    ),
    "dweight_without_the_last_row": one(
        "dweight += tl.sum(dy * rounded(normed, dtype, LLAMA), 0, keep_dims=True)",
        "dweight += tl.sum(tl.where(row < rows - 1, dy * rounded(normed, dtype, LLAMA), 0.0), 0, keep_dims=True)",
        "gradients",
    ),
    "dweight_tail_unwritten": one("return cdiv(columns, width)", "return columns // width", "uninitialised"),
    "long_rows_cut_short": one(
        "range(COLUMNS, columns, COLUMNS)", "range(COLUMNS, columns - COLUMNS + 1, COLUMNS)", "extents"
    ),
    "offsets_in_32_bits": one("row * row_stride", "(row * row_stride).to(tl.int32)", "int64_offsets"),
    "x_read_as_contiguous": one(
        "rows, columns, *x.stride(), *weight.stride(), eps",
        "rows, columns, columns, 1, *weight.stride(), eps",
        "layouts",
    ),
    "grad_output_read_as_contiguous": one("(*dy.stride(), *dsum.stride()", "(columns, 1, *dsum.stride()", "layouts"),
    "dx_lost_with_a_frozen_weight": one("dx if need_dx else None", "dx if need_dweight else None", "gradients"),
    "rows_mixed": one(
        "mean = quotient(total, columns)",
        "mean = quotient(tl.sum(total, 0, keep_dims=True), columns)",
        "row_independence",
    ),
    "weight_of_any_size": one("checks.norm_arguments(x, weight, eps)", "pass", "error_parity"),
    "saved_tensor_used_up": one(
        "    if need_dweight:\n        sums",
        "    rstd.data.zero_()\n    if need_dweight:\n        sums",
        "retained_backward",
    ),
    "second_derivative_zero": one(*LYING),
}
