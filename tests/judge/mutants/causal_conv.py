"""Wrong short convolutions."""

from tests.judge.mutants.mutant import LYING, Mutant, one

ONE_PROGRAM = ("PROGRAMS = 4096", "PROGRAMS = 1")

TABLE = {
    "documents_run_on": one(
        "inside = (token - back >= begin)", "inside = (token - back >= 0)", "argument_kinds", "value"
    ),
    "gradient_of_the_next_document": one(
        "inside = (token + ahead < end)", "inside = (token + ahead < tokens)", "argument_kinds", "gradients"
    ),
    "tap_of_the_token_is_the_first": one(
        "column * weight_row + (WIDTH - 1 - back) * weight_column",
        "column * weight_row + back * weight_column",
        "value",
    ),
    "activation_forgotten": one("        z = z * share\n", "        z = z + 0 * share\n", "one_at_a_time"),
    "activation_without_gradient": one(
        "dz * (share * (1.0 + z * complement))", "dz * (share + 0.0 * complement)", "one_at_a_time"
    ),
    "derivative_without_the_bias": one("                z = bias\n", "                z = bias * 0\n", "gradients"),
    "slope_of_the_token_for_all": one(
        "xs[WIDTH - 1 + ahead - back]", "xs[WIDTH - 1 - back]", "one_at_a_time", "gradients"
    ),
    "dx_by_the_wrong_tap": one("taps[ahead] * dz, 0.0", "taps[WIDTH - 1 - ahead] * dz, 0.0", "gradients"),
    "dweight_in_reverse": one(
        "column * WIDTH + (WIDTH - 1 - back), total", "column * WIDTH + back, total", "gradients"
    ),
    "dweight_of_the_last_tile": Mutant((ONE_PROGRAM, ("sums += (dtaps[back] + dz *", "sums += (dz *")), ("extents",)),
    "dbias_of_the_last_tile": Mutant((ONE_PROGRAM, ("dbias += dz", "dbias = dz")), ("gradients",)),
    "bias_read_as_the_weight_lies": one(
        "0 if bias is None else bias.stride(0),\n        WIDTH=weight.shape[1]",
        "0 if bias is None else weight.stride(0),\n        WIDTH=weight.shape[1]",
        "layouts",
        "value",
    ),
    "grad_output_read_as_x_lies": one(
        "*dy.stride(), *x.stride(), *weight", "*x.stride(), *x.stride(), *weight", "layouts"
    ),
    "neighbour_read": one("inside & (column < columns), other=0.0)", "inside, other=0.0)", "guard_reads"),
    "tokens_in_32_bits": one(
        "token = ((tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]",
        "token = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS))[:, None]",
        "int64_offsets",
    ),
    "sum_rounded_to_16_bits": one(
        "z += taps[back] * load_tokens(",
        "z += (taps[back] + z * 0).to(tl.float16).to(tl.float32) * load_tokens(",
        "value",
    ),
    "documents_of_any_kind": one('document_checks.documents_cover(cu_seqlens, len(x), "x")', "pass", "error_parity"),
    "seven_documents_searched": one(
        "tokens, channels, documents, documents.bit_length(), blocks,\n        *x.stride()",
        "tokens, channels, documents, min(3, documents.bit_length()), blocks,\n        *x.stride()",
        "argument_kinds",
    ),
    "second_derivative_zero": one(*LYING),
}
