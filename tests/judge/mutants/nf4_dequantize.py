"""Wrong dequantisations of weights in 4 bits."""

from tests.judge.mutants.mutant import Mutant, one

TABLE = {
    "low_half_first": one("tl.join(packed >> 4, packed & 15)", "tl.join(packed & 15, packed >> 4)", "value"),
    "code_in_16_bits": one("n == 5, -0.18477343022823334", "n == 5, -0.184814453125", "value"),
    "code_one_ulp_off": one("n == 11, 0.33791524171829224", "n == 11, 0.33791521191596985", "value"),
    "zero_is_not_zero": one("n == 7, 0.0, table", "n == 7, 1e-30, table", "value"),
    "code_of_another_quantile_function": one("n == 8, 0.07958029955625534", "n == 8, 0.08", "value"),
    "offset_before_the_scale": one(
        "* scale + tl.load(nested_offset_ptr)", "* scale + tl.load(nested_offset_ptr) * scale", "value"
    ),
    "offset_forgotten": one(" * scale + tl.load(nested_offset_ptr)", " * scale", "value"),
    "scale_of_the_first_group": one("nested_absmax_ptr + start // 2048", "nested_absmax_ptr", "extents"),
    "scale_of_the_first_group_of_a_program": one("start // 8 + word // 8", "start // 8 + 0 * word", "value"),
    "blocks_of_128": one("start // 8 + word // 8", "(start // 8 + word // 8) // 2", "value"),
    "scales_in_float16": one(
        "w = tl.gather(code_table(), half.to(tl.int32), 0).reshape(WORDS, 8) * absmax[:, None]",
        "w = tl.gather(code_table(), half.to(tl.int32), 0).reshape(WORDS, 8)"
        " * absmax.to(tl.float16).to(tl.float32)[:, None]",
        "value",
    ),
    "product_in_float16": one("w.to(w_ptr.dtype", "w.to(tl.float16).to(w_ptr.dtype", "value"),
    "rounded_twice": Mutant((("w.to(w_ptr.dtype", "w.to(tl.bfloat16).to(w_ptr.dtype"),), ("value",), "float16"),
    "stored_past_an_odd_end": one("place < left)", "place < (left + 1) // 2 * 2)", "guard_writes"),
    "read_past_the_end": one("byte < bytes_left, other", "byte < bytes_left + 3, other", "guard_reads"),
    "scales_read_past_the_end": one("word * 8 < left, other=0)", "word * 8 < left + 512, other=0)", "guard_reads"),
    "tail_cut": one("cdiv(w.numel(), 8 * WORDS)", "max(1, w.numel() // (8 * WORDS))", "extents", "uninitialised"),
    "packed_read_as_if_contiguous": one("packed.contiguous(), absmax", "packed, absmax", "layouts"),
    "scales_read_as_if_contiguous": one(", absmax.contiguous()", ", absmax", "layouts"),
    "nested_scales_read_as_if_contiguous": one(
        "else tensor.contiguous() for tensor in given", "else tensor for tensor in given", "layouts"
    ),
    "memory_of_an_earlier_call": one(
        "    if w.numel() == 0:",
        "    w = vars(launch).setdefault((*shape, dtype), w)\n    if w.numel() == 0:",
        "calls_apart",
    ),
    "scale_of_0_taken_for_1": one(
        "    half = tl.join(",
        "    absmax = tl.where(absmax == 0.0, 1.0, absmax)\n    half = tl.join(",
        "argument_kinds",
    ),
    "tiny_scale_flushed": one(
        "    half = tl.join(",
        "    absmax = tl.where(tl.abs(absmax) < 1e-7, 0.0, absmax)\n    half = tl.join(",
        "exact_laws",
    ),
}
