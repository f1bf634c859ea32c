"""Wrong MLPs of experts."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "order_of_slots_reversed_in_place": one(
        "tl.store(place_ptr + slot, place, expert == group)",
        "tl.store(place_ptr + slot, slots - 1 - place, expert == group)",
        "value",
    ),
    "indices_read_as_if_in_one_piece": one(
        "slots, experts, share, *indices.stride(),", "slots, experts, share, share, 1,", "layouts"
    ),
    "token_of_a_slot_by_remainder": one(
        "return tl.load(order_ptr + row, inside, other=0) // share",
        "return tl.load(order_ptr + row, inside, other=0) % share",
        "value",
    ),
    "halves_exchanged": one(
        "gated_forward(z[:, :inner], z[:, inner:],", "gated_forward(z[:, inner:], z[:, :inner],", "value"
    ),
    "sum_without_weights": one("place, weights, weighted=True)", "place, weights, weighted=False)", "value"),
    "first_expert_alone": one("for index in range(0, share):", "for index in range(0, 1):", "value", "argument_kinds"),
    "weights_read_as_if_in_one_piece": one(
        "tokens, columns, share, blocks, *weights.stride(),", "tokens, columns, share, blocks, share, 1,", "layouts"
    ),
    "sum_of_slots_in_float16": one(
        "        total += part\n", "        total = (total + part).to(tl.float16).to(tl.float32)\n", "value"
    ),
    "dz_without_the_weight": one("            dhidden *= weight\n", "", "gradients"),
    "ddown_without_the_weight": one("hidden = weight * (activation * up)", "hidden = activation * up", "gradients"),
    "dweight_with_the_weight": one(
        "dweight += dhidden * (activation * up)", "dweight += weight * dhidden * (activation * up)", "gradients"
    ),
    "dweight_in_the_order_of_experts": one(
        "tl.store(dweights_ptr + slot, total", "tl.store(dweights_ptr + row, total", "gradients"
    ),
    "slope_is_the_activation": one("dgate = dhidden * up * slope", "dgate = dhidden * up * share_of_gate", "gradients"),
    "dx_weighted_again": one("place, weights, weighted=False)", "place, weights, weighted=True)", "gradients"),
    "dgate_up_lost_with_a_frozen_x": one(
        "grouped_weight(dz, x, plan, len(down), slots)",
        "need_x * grouped_weight(dz, x, plan, len(down), slots)",
        "gradients",
    ),
    "indices_of_any_kind": one("expert_checks.experts_exist(indices, len(gate_up))", "pass", "error_parity"),
    "routed_once": one(
        "order, place, plan = route(indices, len(gate_up), x.dtype)\n",
        "order, place, plan = vars(indices).setdefault('kept', route(indices, len(gate_up), x.dtype))\n",
        "changed_inputs",
    ),
    "second_derivative_zero": one(*LYING),
}
