"""Wrong MLPs of experts."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "order_of_slots_reversed_in_place": one(
        "tl.store(place_ptr + slot, place, expert == group)",
        "tl.store(place_ptr + slot, slots - 1 - place, expert == group)",
        "value",
    ),
    "indices_read_as_if_in_one_piece": one(
        "slots, experts, share, *indices.stride(),", "slots, experts, share, share, 1,", "value"
    ),
    "token_of_a_slot_by_remainder": one(
        "return tl.load(order_ptr + row, inside, other=0) // share",
        "return tl.load(order_ptr + row, inside, other=0) % share",
        "value",
    ),
    "halves_exchanged": one(
        "return gate.to(tl.float32), up.to(tl.float32)", "return up.to(tl.float32), gate.to(tl.float32)", "value"
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
    "slope_is_the_activation": one("dhidden * up * slope", "dhidden * up * share_of_gate", "gradients"),
    "dx_weighted_again": one("place, weights, weighted=False)", "place, weights, weighted=True)", "gradients"),
    "dgate_up_lost_with_a_frozen_x": one(
        "grouped_weight(dz, x, plan, len(down), slots)",
        "need_x * grouped_weight(dz, x, plan, len(down), slots)",
        "gradients",
    ),
    "offset_missing_in_dgate": one("gate * share_of_gate, up + OFFSET", "gate * share_of_gate, up", "one_at_a_time"),
    "alpha_missing_in_the_backward_pass": one(
        "share_of_gate, slope = share_and_slope(gate * ALPHA,",
        "share_of_gate, slope = share_and_slope(gate,",
        "one_at_a_time",
    ),
    "gradient_through_the_clamps": one(
        "dhidden * activation, gate_in, up_in, LIMIT", "dhidden * activation, gate_in, up_in, None", "one_at_a_time"
    ),
    "bias_of_the_first_expert": one("group.to(tl.int64) * bias_row", "0 * bias_row", "value"),
    "bias_read_as_if_in_one_piece": one(
        "*weight.stride(), *added.stride(),", "*weight.stride(), columns, 1,", "layouts"
    ),
    "dweight_without_the_bias": one("if BIAS:\n            total +=", "if False:\n            total +=", "extents"),
    "dweight_with_the_bias_of_another_slot": one("products_ptr + slot, row <", "products_ptr + row, row <", "extents"),
    "dot_with_the_bias_of_a_neighbour": one(
        "bias_ptr + expert.to(tl.int64)[:, None] * bias_row",
        "bias_ptr + tl.abs(expert - 1).to(tl.int64)[:, None] * bias_row",
        "extents",
    ),
    "dbias_without_the_weight": one("summand *= slot_weights(", "slot_weights(", "extents"),
    "dbias_of_the_last_rows": one("        total += summand\n", "        total = summand\n", "extents"),
    "dbias_of_an_idle_expert_not_written": one(
        "    columns_ptr = rows_ptr + column.to(",
        "    if begin == end:\n        return\n    columns_ptr = rows_ptr + column.to(",
        "uninitialised",
        "argument_kinds",
    ),
    "dbias_lost_with_frozen_matrices": one(
        "grouped_sum(dz, plan, len(down)) if need_gate_up_bias else",
        "(grouped_sum(dz, plan, len(down)) if need_gate_up else x.new_zeros(z.shape[1]).expand(len(down), -1))"
        " if need_gate_up_bias else",
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
