"""Wrong gated MLPs of layers with adapters."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "gate_and_up_exchanged": one(
        "gated_forward(gate[chunk], up[chunk]", "gated_forward(up[chunk], gate[chunk]", "value"
    ),
    "gelu_for_its_approximation": one('if ACTIVATION == "gelu":', 'if ACTIVATION != "silu":', "one_at_a_time"),
    "scaling_of_gate_for_up": one("bias[i], scaling[i], into)", "bias[i], scaling[0], into)", "one_at_a_time"),
    "scaling_of_down_missing": one("bias[2], scaling[2], out[chunk])", "bias[2], 1.0, out[chunk])", "one_at_a_time"),
    "bias_of_down_missing": one("bias[2], scaling[2], out", "None, scaling[2], out", "value"),
    "last_tokens_left_out": one(
        "for start in range(0, lines, CHUNK))",
        "for start in range(0, max(min(lines, CHUNK), lines // CHUNK * CHUNK), CHUNK))",
        "argument_kinds",
    ),
    "gradients_of_the_last_chunk": one(
        "sums[name] = sums[name].add_(term) if name in sums else term", "sums[name] = term", "argument_kinds"
    ),
    "adapters_of_down_from_the_first_chunk": one(
        "out=inner_low[chunk])", "out=inner_low[: len(hidden)])", "argument_kinds"
    ),
    "sums_of_chunks_in_float16": one(
        "if lines <= CHUNK else torch.float32", "if lines <= CHUNK else torch.float16", "argument_kinds"
    ),
    "dh_of_the_layer_alone": one("torch.mm(inner_dlow, inner_a, out=dgate)", "dgate.zero_()", "gradients"),
    "dh_added_to_what_was_there": one(
        "torch.mm(inner_dlow, inner_a, out=dgate)", "dgate.addmm_(inner_dlow, inner_a)", "uninitialised"
    ),
    "gate_overwritten": one(
        "dgate, dup = (torch.empty_like(one) for one in own[1:])",
        "dgate, dup = own[1], torch.empty_like(own[2])",
        "gradients",
    ),
    "up_overwritten": one(
        "dgate, dup = (torch.empty_like(one) for one in own[1:])",
        "dgate, dup = torch.empty_like(own[1]), own[2]",
        "retained_backward",
    ),
    "hidden_over_up": one(
        "hidden = torch.empty_like(own[1]) if needs_hidden else None",
        "hidden = own[2] if needs_hidden else None",
        "retained_backward",
    ),
    "hidden_without_up": one("again = gate * share * up", "again = gate * share", "gradients"),
    "hidden_from_dgate": one(
        'add("lora_a[2]", inner_dlow, hidden)',
        'add("lora_a[2]", inner_dlow, dgate if needs_inner else hidden)',
        "gradients",
    ),
    "hidden_lost_with_frozen_inputs": one(
        "        elif hidden is not None:\n            hidden =",
        "        elif False:\n            hidden =",
        "gradients",
        "uninitialised",
    ),
    "dx_of_gate_alone": one(".addmm_(dup, wide(of_up, rows, b[1]))", "", "gradients"),
    "dx_without_adapters": one("torch.mm(dlow, a, out=into)", "into.zero_()", "gradients"),
    "dlow_of_down_unscaled": one("b[2:], scaling[2:])", "b[2:], [1.0])", "one_at_a_time"),
    "dlow_of_gate_and_up_unscaled": one("b[:2], scaling[:2])", "b[:2], [1.0, 1.0])", "one_at_a_time"),
    "db_scaled_by_the_first": one("lows[i][chunk], scaling[i])", "lows[i][chunk], scaling[0])", "one_at_a_time"),
    "db_of_the_first_tokens": one("lows[i][chunk], scaling[i])", "lows[i][: len(one)], scaling[i])", "argument_kinds"),
    "da_lost_with_a_frozen_x": one(
        'add("lora_a", dlow, rows[chunk])', 'add("lora_a", dlow if needs_x else 0 * dlow, rows[chunk])', "gradients"
    ),
    "weight_taken_for_frozen": one(
        "[3], [one[0] and len(one) == 1 for one in of_weights]", "[3], [False for one in of_weights]", "gradients"
    ),
    "da_of_a_wide_adapter_rounded": one(
        "dtype_of_all(x, lora_a[:2])\n    if", "x.dtype\n    if", "extents", dtype="bfloat16"
    ),
    "da_of_gate_for_up": one("enumerate(below) if needs[2][i]", "enumerate(below[::-1]) if needs[2][i]", "gradients"),
    "rank_of_gate_when_compiled": one(
        "rank_of_all(lora_a[:2]), len(lora_a[2])", "len(lora_a[0]) * 2, len(lora_a[2])", "value", "opcheck"
    ),
    "layers_of_any_shape": one(
        "adapter_checks.lora_mlp_arguments(x, weight, lora_a, lora_b, scaling, bias, activation)",
        "pass",
        "error_parity",
    ),
    "second_derivative_zero": one(*LYING),
}
