"""Wrong linear layers with adapters of one input."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "scaling_of_the_first_layer": one("bias[i], scaling[i], out)", "bias[i], scaling[0], out)", "value"),
    "adapter_of_the_first_layer": one("b[i], own, bias", "b[i], low[:, : own.shape[1]], bias", "value"),
    "every_rank_that_of_the_first": one(
        "return whole.split_with_sizes([one.shape[0] for one in lora_a], dimension)",
        "return [whole.narrow(dimension, i * len(lora_a[0]), len(t)) for i, t in enumerate(lora_a)]",
        "value",
    ),
    "bias_of_the_first_layer_alone": one(
        "bias[i], scaling[i], out)", "bias[i] if i == 0 else None, scaling[i], out)", "value"
    ),
    "adapters_in_float16": one("[one for _, one in pairs])", "[one.half() for _, one in pairs])", "value"),
    "dx_of_the_first_layer": one("zip(each_dy, each, b, strict=True)", "zip(each_dy[:1], each, b)", "gradients"),
    "dx_of_the_adapters_missing": one("torch.mm(dlow, a, out=total)", "total.zero_()", "gradients"),
    "dx_added_to_what_was_there": one("torch.mm(dlow, a, out=total)", "total.addmm_(dlow, a)", "uninitialised"),
    "dx_over_x": one("total = dx.view(rows.shape)", "total, dx = rows, rows.view(x.shape)", "inputs_untouched"),
    "dlow_without_scaling": one("beta=0, alpha=factor", "beta=0", "gradients"),
    "db_scaled_by_the_first": one("lora_b[i].dtype, scaling[i])", "lora_b[i].dtype, scaling[0])", "gradients"),
    "scaling_of_another_layer_in_use": one("of_used(scaling)", "scaling[: len(used)]", "gradients"),
    "da_scaled_twice": one("rows, dtype_of_all(x, lora_a))", "rows, dtype_of_all(x, lora_a), scaling[0])", "gradients"),
    "da_of_a_wide_adapter_rounded": one(
        "product(dlow, rows, dtype_of_all(x, lora_a))",
        "product(dlow, rows, x.dtype).to(dtype_of_all(x, lora_a))",
        "extents",
        dtype="bfloat16",
    ),
    "dweight_of_the_layer_before": one(
        "product(one, rows, x.dtype)", "product(each_dy[min(i, 1)], rows, x.dtype)", "gradients"
    ),
    "frozen_with_its_neighbour": one("if needs[1][i] else None", "if all(needs[1]) else None", "gradients"),
    "leading_dimensions_read_as_one": one(
        "flat = tensor.reshape(rows, tensor.shape[-1])",
        "flat = tensor.as_strided((rows, tensor.shape[-1]), tensor.stride()[-2:] if tensor.ndim > 1 else (1, 1))",
        "argument_kinds",
    ),
    "biases_of_the_first_layer_alone_asked": one(
        "own, bias[i], scaling[i], out)",
        "own, bias[i] if bias[0] is not None else None, scaling[i], out)",
        "argument_kinds",
    ),
    "adapters_rounded_once": Mutant(
        (
            (
                "    below = x.new_empty(",
                "    kept = vars(lora_a[0]).get('kept')\n    if kept:\n        return kept\n    below = x.new_empty(",
            ),
            ("    return below, each\n", "    lora_a[0].kept = below, each\n    return below, each\n"),
        ),
        ("changed_inputs",),
    ),
    "second_derivative_zero": one(*LYING),
}
