"""Wrong linear layers in float8."""

from tests.judge.mutants.mutant import one

TABLE = {
    "scale_of_x_left_out": one(
        "part * (tl.load(left_scale, row < rows, other=0.0) * scale)[:, None]", "part * scale + 0.0", "value"
    ),
    "scale_of_the_first_block_of_x": one("+ of_inner * left_scale_column", "", "value"),
    "scale_of_the_first_columns_of_the_weight": one("+ of_inner * scale_inner_stride", "", "value"),
    "scale_of_the_first_rows_of_the_weight": one("scale_ptr + block * scale_column_stride", "scale_ptr", "value"),
    "scale_of_the_weight_transposed": one("scale.t(), None, dx", "scale.t().contiguous().t(), None, dx", "gradients"),
    "x_not_quantised": one("number = nearest_e4m3(quotient)", "number = quotient", "value"),
    "x_quantised_with_two_bits": one("* 1572864.0", "* 3145728.0", "value"),
    "x_scaled_in_other_blocks": one("quantise(rows, 1, values", "quantise(rows, 128, values", "value", "guard_writes"),
    "last_columns_of_x_dropped": one("range(0, inner, INNER)", "range(0, inner - INNER + 1, INNER)", "value"),
    "sum_of_a_block_in_16_bits": one(
        'decoded(numbers, left.dtype), input_precision="ieee")',
        'decoded(numbers, left.dtype), input_precision="ieee").to(tl.float16).to(tl.float32)',
        "value",
    ),
    "last_block_alone": one("            total += part * scale\n", "            total = part * scale\n", "gradients"),
    "dy_in_16_bits": one("product(rows, None,", "product(rows.half().to(rows.dtype), None,", "gradients"),
    "dx_of_the_first_rows": one("height = tl.minimum(row_tiles - begin, GROUP)", "height = GROUP", "value", "extents"),
    "bias_left_out": one("if BIASED:", "if BIASED and rows < 0:", "value"),
    "bias_read_as_if_in_one_piece": one("vector.stride(0),", "1,", "layouts"),
    "dbias_added_up_in_float16": one(
        "rows.sum(0, dtype=torch.float32)",
        "sum(rows.unbind(), torch.zeros_like(rows[0]))",
        "gradients",
        dtype="float16",
    ),
    "stored_past_the_rows": one(
        "inside_rows, inside_columns = (row < rows)[:, None]",
        "inside_rows, inside_columns = (row <= rows)[:, None]",
        "guard_writes",
    ),
    "dy_in_32_bits": one(
        "left_ptr + row[:, None] * left_row", "left_ptr + (row[:, None] * left_row).to(tl.int32)", "int64_offsets"
    ),
    "weight_in_32_bits": one(
        "column[None, :] * weight_column_stride",
        "(column[None, :] * weight_column_stride).to(tl.int32)",
        "int64_offsets",
    ),
    "sum_of_all_blocks_in_16_bits": one(
        "total += part * (tl.load(left_scale, row < rows, other=0.0) * scale)[:, None]",
        "total += part * (tl.load(left_scale, row < rows, other=0.0) * scale)[:, None]\n"
        "            total = total.to(y_ptr.dtype.element_ty).to(tl.float32)",
        "argument_kinds",
        dtype="float16",
    ),
}
