"""Wrong conversions to float8."""

from tests.judge.mutants.mutant import Mutant, one

MAGNITUDE = "x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)"


def of_bits(old: str, new: str, found_by: str) -> Mutant:
    """A mutant of the form that moves bits, which a GPU from sm_89 on does not execute."""
    return Mutant(((old, new),), (found_by,), device="cpu")


TABLE = {
    "scale_for_e4m3_of_amd": one("tl.full(largest.shape, 448.0", "tl.full(largest.shape, 240.0", "value"),
    "zeros_without_a_scale": one("tl.where(largest == 0.0, 1.0, scale)", "scale", "value"),
    "scale_without_a_floor": one(
        "tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)", "scale", "argument_kinds"
    ),
    "truncated": of_bits(
        "return (x + shift) - shift",
        "return (x.to(tl.int32, bitcast=True) & -1048576).to(tl.float32, bitcast=True)",
        "value",
    ),
    "two_bits_of_fraction": of_bits("* 1572864.0", "* 3145728.0", "value"),
    "subnormal_numbers_flushed": of_bits("normal, subnormal)", "normal, 0)", "value"),
    "sign_lost": of_bits("0x7F, byte).to(tl.uint8) | negative", "0x7F, byte).to(tl.uint8)", "value"),
    "nan_encoded_as_a_number": of_bits("tl.where(magnitude > 0x7F800000, 0x7F, byte)", "byte", "special_values"),
    "nan_left_out_of_the_scale": one(MAGNITUDE, f"tl.where(x == x, x, 0.0).{MAGNITUDE[2:]}", "special_values"),
    "scale_of_the_first_row": one("magnitude = tl.zeros_like(magnitude) + tl.max(magnitude, 0)", "pass", "value"),
    "scale_in_16_bits": one(
        "scale = scale_of(magnitude)", "scale = scale_of(magnitude).to(tl.float16).to(tl.float32)", "value"
    ),
    "stored_past_the_end": one(
        "encoded(quotient), inside)",
        "encoded(quotient), (row < rows)[:, None] & (column <= columns)[None, :])",
        "guard_writes",
    ),
    "last_rows_left_out": one(
        "cdiv(rows, height) * blocks(columns)", "max(1, rows // height) * blocks(columns)", "value", "uninitialised"
    ),
    "x_read_as_if_in_one_piece": one(
        "columns, blocks(columns), *x.stride(),", "columns, blocks(columns), columns, 1,", "layouts"
    ),
    "infinite_scale_makes_all_nan": one('tl.where(divisor == float("inf"), 0.0, divisor)', "divisor", "special_values"),
    "offsets_in_32_bits": one(
        "x_ptr + row[:, None] * x_row", "x_ptr + (row[:, None] * x_row).to(tl.int32)", "int64_offsets"
    ),
}
