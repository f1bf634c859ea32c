"""Wrong linear layers in float8."""

from tests.judge.mutants.mutant import one

STORE = "tl.store(values_ptr + offset, x.to(values_ptr.dtype.element_ty), "
TABLE = {
    "scale_of_x_left_out": one("nearest_e4m3(quotient) * scale[:, None]", "nearest_e4m3(quotient)", "value"),
    "x_not_quantised": one("x = nearest_e4m3(quotient) *", "x = quotient *", "value"),
    "x_quantised_with_two_bits": one("* 1572864.0", "* 3145728.0", "value"),
    "x_scaled_in_other_blocks": one("quantise(rows, 1, quantised)", "quantise(rows, 128, quantised)", "value"),
    "x_in_16_bits": one(
        f"{STORE}inside)",
        "tl.store(values_ptr + offset, x.to(tl.float16).to(values_ptr.dtype.element_ty), inside)",
        "value",
    ),
    "x_stored_past_the_end": one(
        f"{STORE}inside)",
        f"{STORE}(row < rows)[:, None] & (column <= columns)[None, :])",
        "value",
        "guard_writes",
    ),
    "x_in_32_bits": one("x_ptr + row[:, None] * x_row", "x_ptr + (row[:, None] * x_row).to(tl.int32)", "int64_offsets"),
    "last_columns_of_x_left_out": one("cdiv(rows, height) * blocks(columns), x,", "cdiv(rows, height), x,", "value"),
    "weight_without_its_scale": one(
        "dequantised(numbers, scale, x.dtype)", "dequantised(numbers, torch.ones_like(scale), x.dtype)", "value"
    ),
    "weight_with_the_scale_of_its_first_columns": one(
        "of_row * scale_row + block * scale_column", "of_row * scale_row", "value"
    ),
    "weight_with_the_scale_of_another_block": one("row // COLUMNS if WHOLE", "row // (2 * COLUMNS) if WHOLE", "value"),
    "sign_of_the_weight_lost": one("((wide & 0x80) << 8) | ", "", "value"),
    "weight_in_16_bits": one(
        "dequantised(numbers, scale, x.dtype)", "dequantised(numbers, scale, torch.float16).to(x.dtype)", "value"
    ),
    "weight_in_32_bits": one(
        "values_ptr + row[:, None] * values_row",
        "values_ptr + (row[:, None] * values_row).to(tl.int32)",
        "int64_offsets",
    ),
    "dx_without_the_scale": one(
        "dequantised(numbers, scale, dy.dtype)", "dequantised(numbers, torch.ones_like(scale), dy.dtype)", "gradients"
    ),
    "dy_in_16_bits": one("torch.mm(rows, dequantised", "torch.mm(rows.half().to(rows.dtype), dequantised", "gradients"),
    "bias_left_out": one("if bias is None:\n            torch.mm(q", "if len(out):\n            torch.mm(q", "value"),
    "bias_twice": one("torch.addmm(bias, quantised", "torch.addmm(2 * bias, quantised", "value"),
    "dbias_added_up_in_float16": one(
        "rows.sum(0, dtype=torch.float32)",
        "sum(rows.unbind(), torch.zeros_like(rows[0]))",
        "gradients",
        dtype="float16",
    ),
    "sizes_of_whole_blocks_in_fewer_bits": one(
        "torch.mm(quantised, weight, out=out)",
        "whole = len(rows) % 4 == 0 and all(size % 16 == 0 for size in weight.shape)\n"
        "            torch.mm(quantised, weight.half().to(x.dtype) if whole else weight, out=out)",
        "value",
    ),
    "sum_of_all_blocks_in_16_bits": one(
        "torch.mm(quantised, weight, out=out)",
        "out.copy_(sum(one @ other for one, other in zip(quantised.split(128, 1), weight.split(128), strict=True)))",
        "argument_kinds",
        dtype="float16",
    ),
}
