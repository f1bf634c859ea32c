"""Wrong linear layers with adapters."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "scaling_ignored": one("alpha=scaling, out=out", "alpha=1.0, out=out", "value"),
    "scaling_over_the_rank_again": one(
        "alpha=scaling, out=out", "alpha=scaling / max(1, low.shape[1]), out=out", "value"
    ),
    "scaling_of_the_layer_too": one("rows, weight.t())", "rows, weight.t(), alpha=scaling)", "value"),
    "layer_over_the_adapter": one("rows, weight.t())", "rows, weight.t(), beta=0)", "value"),
    "y_added_to_what_was_there": one("(out, 0) if bias is None", "(out, 1) if bias is None", "uninitialised"),
    "bias_left_out": one("if bias is None else (bias, 1)", "if True else (bias, 1)", "value"),
    "bias_scaled": one("torch.addmm(start, low", "torch.addmm(scaling * start, low", "value"),
    "rank_of_64": one(
        "torch.mm(rows, lora_a.to(x.dtype).t(), out=low)",
        "torch.mm(rows, lora_a.to(x.dtype).t(), out=low)[:, 64:].zero_()",
        "gradients",
        "value",
    ),
    "adapter_in_float16": one(
        "torch.mm(rows, lora_a.to(x.dtype).t(), out=low)",
        "torch.mm(rows, lora_a.half().to(x.dtype).t(), out=low)",
        "value",
    ),
    "gradient_of_a_wide_adapter_rounded": one(
        "da = product(dlow, rows, lora_a.dtype)",
        "da = product(dlow, rows, x.dtype).to(lora_a.dtype)",
        "extents",
        dtype="bfloat16",
    ),
    "low_rounded_to_fewer_bits": one(
        "torch.mm(rows, lora_a.to(x.dtype).t(), out=low)",
        "low.copy_(torch.mm(rows, lora_a.to(x.dtype).t()).bfloat16())",
        "value",
        dtype="float16",
    ),
    "layer_under_autocast": one("out.addmm_(rows, weight.t())", "out.add_(torch.mm(rows, weight.t()))", "autocast"),
    "x_read_as_contiguous": one(
        "flat = tensor.reshape(rows, tensor.shape[-1])",
        "flat = tensor.as_strided((rows, tensor.shape[-1]), (tensor.shape[-1], 1))",
        "layouts",
        "guard_reads",
    ),
    "strides_in_31_bits": one(
        "flat if max(flat.stride()) < 2**31 else flat.contiguous()",
        "flat.as_strided(flat.shape, [stride % 2**31 for stride in flat.stride()])",
        "int64_offsets",
    ),
    "dx_of_the_layer_alone": one("torch.mm(dlow, lora_a.to(x.dtype), out=flat)", "flat.zero_()", "gradients"),
    "dx_of_the_adapter_alone": one("            flat.addmm_(dy, weight)\n", "", "gradients"),
    "dx_over_x": one("flat = dx.view(rows.shape)", "flat, dx = rows, rows.view(x.shape)", "inputs_untouched"),
    "dx_added_to_what_was_there": one(
        "torch.mm(dlow, lora_a.to(x.dtype), out=flat)", "flat.addmm_(dlow, lora_a.to(x.dtype))", "uninitialised"
    ),
    "dlow_without_scaling": one("beta=0, alpha=scaling)", "beta=0)", "gradients"),
    "dlow_added_to_what_was_there": one("beta=0, alpha=scaling)", "alpha=scaling)", "uninitialised"),
    "dlow_over_low": one("torch.empty_like(low).addmm_(dy", "low.addmm_(dy", "gradients"),
    "da_scaled_twice": one(
        "product(dlow, rows, lora_a.dtype)", "product(dlow, rows, lora_a.dtype, scaling)", "gradients"
    ),
    "db_without_scaling": one("product(dy, low, lora_b.dtype, scaling)", "product(dy, low, lora_b.dtype)", "gradients"),
    "da_lost_with_a_frozen_x": one("if needs_x or needs_a:", "if needs_x:", "gradients"),
    "db_lost_with_a_frozen_lora_a": one("if needs_b:", "if needs_a and needs_b:", "gradients"),
    "weight_taken_for_frozen": one("if needs_weight:", "if False:", "gradients", "uninitialised"),
    "dbias_of_the_first_row": one("dy.sum(0, dtype=torch.float32)", "dy[0]", "gradients"),
    "dbias_added_up_in_float16": one(
        "dy.sum(0, dtype=torch.float32)", "sum(dy.unbind(), torch.zeros_like(dy[0]))", "gradients", dtype="float16"
    ),
    "dbias_zero_without_columns": one(
        "if dy.numel() == 0:", "if dy.numel() == 0 or x.shape[-1] == 0:", "argument_kinds"
    ),
    "da_of_the_wrong_dtype_when_compiled": Mutant(
        (("lora_a.new_empty(lora_a.shape if needs_a", "x.new_empty(lora_a.shape if needs_a"),),
        ("opcheck",),
        "float16",
    ),
    "dbias_empty_when_compiled": one("x.new_empty(weight.shape[:1] if needs_bias else 0)", "x.new_empty(0)", "opcheck"),
    "leading_dimensions_read_as_one": one(
        "flat = tensor.reshape(rows, tensor.shape[-1])",
        "flat = tensor.as_strided((rows, tensor.shape[-1]), tensor.stride()[-2:] if tensor.ndim > 1 else (1, 1))",
        "argument_kinds",
    ),
    "bias_of_a_layer_in_4_bits_frozen": one(
        "needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad",
        "needs_x, _, needs_a, needs_b, *_, needs_bias = ctx.needs_input_grad",
        "gradients",
    ),
    "weight_in_4_bits_rounded_more_backward": one(
        "weight = _wide(parts, ctx.shape, x.dtype)",
        "weight = _wide(parts, ctx.shape, torch.float16).to(x.dtype)",
        "gradients",
    ),
    "x_of_a_layer_in_float8_not_quantised": one("through_float8(rows) if float8 else rows", "rows", "value"),
    "x_of_all_layers_quantised": one("through_float8(rows) if float8 else rows", "through_float8(rows)", "value"),
    "x_of_the_adapter_quantised_too": one(
        "torch.mm(rows, lora_a.to(x.dtype).t(), out=low)",
        "torch.mm(through_float8(rows) if float8 else rows, lora_a.to(x.dtype).t(), out=low)",
        "value",
        "gradients",
    ),
    "weight_in_float8_without_its_scale": one(
        "fp8_dequantize_op(numbers.view(torch.uint8), scale, dtype)",
        "fp8_dequantize_op(numbers.view(torch.uint8), torch.ones_like(scale), dtype)",
        "value",
    ),
    "scaling_lost_beside_4_bits": one(
        "lora_b, low, ctx.scaling, *needs)\n        found", "lora_b, low, 1.0, *needs)\n        found", "gradients"
    ),
    "second_derivative_zero": one(*LYING),
}
