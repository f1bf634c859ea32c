"""Wrong conversions from float8."""

from tests.judge.mutants.mutant import one

TABLE = {
    "scale_of_the_first_columns": one("of_row * scale_row + block * scale_column", "of_row * scale_row", "value"),
    "scale_of_the_first_rows": one("of_row = row // COLUMNS if WHOLE else row", "of_row = row // COLUMNS", "value"),
    "scale_of_another_block": one("row // COLUMNS if WHOLE", "row // (2 * COLUMNS) if WHOLE", "value"),
    "divided_by_the_scale": one(
        "decoded(numbers, tl.float32) * scale[:, None]", "decoded(numbers, tl.float32) / scale[:, None]", "value"
    ),
    "exponent_of_amd": one("half.to(tl.float32) * 256.0", "half.to(tl.float32) * 128.0", "value"),
    "nan_decoded_as_480": one(
        'tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)',
        "half.to(tl.float32) * 256.0",
        "argument_kinds",
    ),
    "largest_number_taken_for_nan": one("(wide & 0x7F) == 0x7F,", "(wide & 0x7F) >= 0x7E,", "value"),
    "sign_lost": one("((wide & 0x80) << 8) | ", "", "value"),
    "subnormal_numbers_flushed": one(
        "half.to(tl.float32) * 256.0)", "tl.where((wide & 0x78) == 0, 0.0, half.to(tl.float32) * 256.0))", "value"
    ),
    "product_in_16_bits": one(
        "decoded(numbers, tl.float32) * scale[:, None]",
        "(decoded(numbers, tl.float16) * scale[:, None].to(tl.float16)).to(tl.float32)",
        "value",
    ),
    "stored_past_the_end": one(
        "x.to(x_ptr.dtype.element_ty), inside)",
        "x.to(x_ptr.dtype.element_ty), (row < rows)[:, None] & (column <= columns)[None, :])",
        "guard_writes",
    ),
    "last_rows_left_out": one("cdiv(rows, ROWS) *", "max(1, rows // ROWS) *", "value", "uninitialised"),
    "values_read_as_if_in_one_piece": one(
        "scale.shape[1], *numbers.stride(),", "scale.shape[1], columns, 1,", "layouts"
    ),
    "offsets_in_32_bits": one(
        "values_ptr + row[:, None] * values_row",
        "values_ptr + (row[:, None] * values_row).to(tl.int32)",
        "int64_offsets",
    ),
    "scale_of_0_taken_for_1": one(
        "    x = decoded(numbers, tl.float32) * scale[:, None]",
        "    x = decoded(numbers, tl.float32) * tl.where(scale == 0.0, 1.0, scale)[:, None]",
        "argument_kinds",
    ),
    "scale_of_at_least_1e_12": one(
        "    x = decoded(numbers, tl.float32) * scale[:, None]",
        "    x = decoded(numbers, tl.float32) * tl.maximum(scale, 1e-12)[:, None]",
        "exact_laws",
    ),
}
