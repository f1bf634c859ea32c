"""Wrong gated activations with SiLU."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "up_for_gate_in_the_sigmoid": one("share, _ = share_and_slope(gate,", "share, _ = share_and_slope(up,", "value"),
    "gelu_constant": one("sigmoids(gate)", "sigmoids(1.702 * gate)", "value"),
    "activation_in_float16": one(
        "y = gate * share * up", "y = (gate * share).to(tl.float16).to(tl.float32) * up", "value"
    ),
    "log2_e_in_five_digits": one("tl.exp(-tl.abs(x))", "tl.exp2(tl.abs(x) * -1.4427)", "value"),
    "dgate_without_the_derivative_of_the_sigmoid": one("(1.0 + gate * complement)", "1.0", "gradients"),
    "dgate_with_the_sigmoid_itself": one("(1.0 + gate * complement)", "(1.0 + gate * share)", "gradients"),
    "dup_without_gate": one("dy * (gate * share)", "dy * share", "gradients"),
    "dup_scaled": one("dy * (gate * share)", "dy * (gate * share) * 1.03", "gradients"),
    "root_not_squared": one("return root * root", "return root", "value"),
    "up_of_any_size": one("checks.gated_arguments(gate, up)", "pass", "error_parity"),
    "needs_swapped": one("need_dgate, need_dup, _ = ctx", "need_dup, need_dgate, _ = ctx", "gradients"),
    "stored_past_the_end": one(
        "dup.to(dup_ptr.dtype.element_ty), inside",
        "dup.to(dup_ptr.dtype.element_ty), (row < rows) & (column <= columns)",
        "guard_writes",
    ),
    "tail_cut": one(
        "cdiv(matrix.shape[1], shape.columns)",
        "max(1, matrix.shape[1] // shape.columns)",
        "uninitialised",
        "value",
    ),
    "last_rows_skipped": one("cdiv(matrix.shape[0], shape.rows)", "max(1, matrix.shape[0] // shape.rows)", "layouts"),
    "gradients_over_the_inputs": one(
        "dgate, dup = gated_backward_outputs(dy, gate, up, activation, need_dgate, need_dup)",
        "dgate, dup = gate, up",
        "inputs_untouched",
    ),
    "offsets_in_32_bits": one(
        "gate = tl.load(gate_ptr + row * gate_row + column * gate_column, inside, other=0.0).to(tl.float32)\n    up =",
        "gate = tl.load(gate_ptr + (row * gate_row).to(tl.int32) + column * gate_column, "
        "inside, other=0.0).to(tl.float32)\n    up =",
        "int64_offsets",
    ),
    "grad_output_offsets_in_32_bits": one(
        "dy_ptr + row * dy_row", "dy_ptr + (row * dy_row).to(tl.int32)", "int64_offsets"
    ),
    "grad_output_read_as_the_gate_lies": one(
        "*dy.stride(), *gate.stride()", "*gate.stride(), *gate.stride()", "layouts"
    ),
    "output_in_float32": one(
        "y = gated_forward_outputs(gate, up, activation)",
        "y = gate.new_empty(gate.shape, dtype=torch.float32)",
        "metadata",
        dtype="float16",
    ),
    "fake_of_another_shape": one(
        "return gate.new_empty(gate.shape)\n\n\ndef", "return gate.new_empty(gate.numel())\n\n\ndef", "opcheck"
    ),
    "second_derivative_zero": one(*LYING),
}
