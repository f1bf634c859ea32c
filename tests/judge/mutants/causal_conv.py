"""Wrong short convolutions."""

from tests.judge.mutants.mutant import LYING, Mutant, one

ONE_PROGRAM = ("RUNS = 2**18", "RUNS = 1")

TABLE = {
    "documents_run_on": one(
        "seen += (tl.where(token - (WIDTH - 1 - place) >= begin,", "seen += (tl.where(token >= begin,", "value"
    ),
    "last_tokens_of_a_document_taken_for_others": one("& (start + ROWS <= end) &", "& (start < end) &", "gradients"),
    "gradient_of_the_next_document": one(
        "tl.where((token - (WIDTH - 1 - place) >= begin) & (token < end),", "tl.where(token < end,", "gradients"
    ),
    "tap_of_the_token_is_the_first": one(
        "column * weight_row + (WIDTH - 1 - back) * weight_column",
        "column * weight_row + back * weight_column",
        "value",
    ),
    "activation_forgotten": one("            z = z * share\n", "            z = z + 0 * share\n", "one_at_a_time"),
    "activation_without_gradient": one(
        "dz * (share * (1.0 + z * complement))", "dz * (share + 0.0 * complement)", "one_at_a_time"
    ),
    "derivative_without_the_bias": one(
        "z = convolved(seen, taps, bias, WIDTH)\n            share",
        "z = convolved(seen, taps, bias * 0, WIDTH)\n            share",
        "gradients",
    ),
    "dx_by_the_wrong_tap": one(
        "dxs[place] + taps[WIDTH - 1 - place] * dz", "dxs[place] + taps[place] * dz", "gradients"
    ),
    "dx_without_the_next_run": Mutant(
        (("RUNS = 2**18", "RUNS = 2**9"), ("((WIDTH + ROWS - 2) // ROWS if NEED_DX else 0)", "0")),
        ("gradients", "uninitialised"),
    ),
    "dweight_of_the_next_run_too": Mutant(
        (("RUNS = 2**18", "RUNS = 2**9"), ("tl.where(token < last, dz, 0.0) if BORDERS else dz", "dz")), ("gradients",)
    ),
    "dweight_in_reverse": one(
        "column * WIDTH + (WIDTH - 1 - back), dtaps", "column * WIDTH + back, dtaps", "gradients"
    ),
    "dweight_of_the_last_token": Mutant(
        (ONE_PROGRAM, ("sums += (dtaps[back] + own *", "sums += (own *")), ("gradients",)
    ),
    "dbias_of_the_last_token": Mutant((ONE_PROGRAM, ("dbias += own", "dbias = own")), ("gradients",)),
    "bias_read_as_the_weight_lies": one(
        "0 if bias is None else bias.stride(0),\n        WIDTH=weight.shape[1]",
        "0 if bias is None else weight.stride(0),\n        WIDTH=weight.shape[1]",
        "layouts",
        "value",
    ),
    "grad_output_read_as_x_lies": one(
        "*dy.stride(), *x.stride(), *weight", "*x.stride(), *x.stride(), *weight", "layouts"
    ),
    "neighbour_read": one(
        "bound = tl.where(inside, columns, 0)", "bound = tl.where(inside, columns + 1, 0)", "guard_reads"
    ),
    "tokens_in_32_bits": one(
        "first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS",
        "first = (tl.program_id(0) // blocks) * ROWS",
        "int64_offsets",
    ),
    "sum_rounded_to_16_bits": one(
        "z = z + taps[back] * xs",
        "z = z + (taps[back] + z * 0).to(tl.float16).to(tl.float32) * xs",
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
