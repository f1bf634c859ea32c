"""Wrong linear layers with adapters of one input."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "scaling_of_the_first_layer": one("b[i].t(), alpha=scaling[i]", "b[i].t(), alpha=scaling[0]", "value"),
    "adapter_of_the_first_layer": one("out.addmm_(own, b", "out.addmm_(low[:, : own.shape[1]], b", "value"),
    "every_rank_that_of_the_first": one(
        "return whole.split([len(one) for one in lora_a], dimension)",
        "return [whole.narrow(dimension, i * len(lora_a[0]), len(one)) for i, one in enumerate(lora_a)]",
        "value",
    ),
    "bias_of_the_first_layer_alone": one("bias[i]\n", "bias[i] if i == 0 else None\n", "value"),
    "adapters_in_float16": one("[one for _, one in pairs])", "[one.half() for _, one in pairs])", "value"),
    "dx_of_the_first_layer": one("                total.addmm_(one, by)\n", "                pass\n", "gradients"),
    "dx_of_the_adapters_missing": one("            total.addmm_(dlow, a)\n", "", "gradients"),
    "dx_added_to_what_was_there": one(
        "torch.mm(each_dy[0], weight[0], out=total)", "total.addmm_(each_dy[0], weight[0])", "uninitialised"
    ),
    "dx_over_x": one("total = dx.view(rows.shape)", "total, dx = rows, rows.view(x.shape)", "inputs_untouched"),
    "dlow_without_scaling": one("beta=0, alpha=factor", "beta=0", "gradients"),
    "dlow_of_x_alone": one("if needs_x or any(needs_a):", "if needs_x:", "gradients"),
    "da_if_all_are_trained": one("        if any(needs_a):", "        if all(needs_a):", "gradients"),
    "da_of_a_wide_adapter_rounded": one(
        "da = product(dlow, rows, da.dtype)",
        "da = product(dlow, rows, x.dtype).to(da.dtype)",
        "gradients",
        "extents",
        dtype="bfloat16",
    ),
    "db_scaled_by_the_first": one("lora_b[i].dtype, scaling[i])", "lora_b[i].dtype, scaling[0])", "gradients"),
    "gradients_of_the_wrong_layer": one("used[number % len(used)]", "used[-1 - number % len(used)]", "gradients"),
    "frozen_with_its_neighbour": one(
        "gradients[at] = one if needs[at] else None", "gradients[at] = one if all(needs) else None", "gradients"
    ),
    "scaling_of_another_layer_in_use": one("of_used(ctx.scaling)", "ctx.scaling[: len(used)]", "gradients"),
    "second_derivative_zero": one(*LYING),
}
