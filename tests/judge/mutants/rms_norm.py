"""Wrong root-mean-square norms."""

from tests.judge.mutants.mutant import LYING, Mutant, one

ONE_PROGRAM = ("each = cdiv(tiles, shape.programs) if sums else 1", "each = tiles if sums else 1")
GRADIENT_MEAN = "mean = quotient(tl.sum(products, 1, keep_dims=True), columns)"

TABLE = {
    "neighbours_columns_read": one(
        "inside = within(row, column, rows, columns, FULL)\n    return",
        "inside = within(row, column, rows, 2 * columns, FULL)\n    return",
        "value",
    ),
    "stored_past_the_end": one(
        "dx.to(dtype), inside)",
        "dx.to(dtype), (row < rows) & (at <= columns))",
        "guard_writes",
    ),
    "one_row_too_many_read": one(  # multiplied by zeros of dy: only NaN shows
        "n = load_tile(x_ptr, row, at, rows, columns,",
        "n = load_tile(x_ptr, row, at, rows + 1, columns,",
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
        f"{GRADIENT_MEAN}\n            for part", f"{GRADIENT_MEAN} * 1.03\n            for part", "gradients"
    ),
    "gradient_mean_of_the_last_part": one("products += g * n", "products = g * n", "extents"),
    "weight_of_the_first_part": one("scales[part]", "scales[0]", "extents"),
    "dweight_of_the_last_tile": Mutant(
        (ONE_PROGRAM, ("sums += (dweight[part] + tl.sum(", "sums += (tl.sum(")), ("extents",)
    ),
    "dweight_without_the_last_row": one(
        "tl.sum(dy * rounded(n, dtype, LLAMA), 0, keep_dims=True)",
        "tl.sum(tl.where(row < rows - 1, dy * rounded(n, dtype, LLAMA), 0.0), 0, keep_dims=True)",
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
        f"{GRADIENT_MEAN}\n            for part",
        f"{GRADIENT_MEAN.replace('products, 1', 'products')}\n            for part",
        "row_independence",
    ),
    "weight_of_any_size": one("checks.norm_arguments(x, weight, eps)", "pass", "error_parity"),
    "saved_tensor_used_up": one(
        "    if need_dweight:\n        blocks",
        "    rstd.data.zero_()\n    if need_dweight:\n        blocks",
        "retained_backward",
    ),
    "second_derivative_zero": one(*LYING),
}
