"""Wrong norms of the heads with a rotary embedding."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "turned_the_other_way": one("tl.where(first, -1.0, 1.0)", "tl.where(first, 1.0, -1.0)", "value"),
    "gradient_turned_forward": one("sin *= -sign", "sin *= sign", "gradients"),
    "rotated_before_the_weight": one(
        "normed_heads(\n        x_ptr, weight_ptr, rstd, head, other, rotated",
        "normed_heads(\n        x_ptr, weight_ptr - half * weight_stride, rstd, head, other, rotated",
        "value",
    ),
    "halves_taken_for_equal": one(
        "row * sin_row + other * sin_column", "row * sin_row + column * sin_column", "argument_kinds"
    ),
    "rest_rotated_too": one(
        "y = tl.where(rotated, y, n.to(tl.float32))", "y = tl.where(column < width, y, n.to(tl.float32))", "value"
    ),
    "mean_over_the_rotated_columns": one(
        "mean = quotient(tl.sum(x * x, 1, keep_dims=True), width)",
        "mean = quotient(tl.sum(x * x, 1, keep_dims=True), 2 * half)",
        "value",
    ),
    "eps_hard_coded": one("mean + eps", "mean + 1e-6", "one_at_a_time"),
    "k_with_the_weight_of_q": one("k_ptr, k_weight_ptr, k_out_ptr,", "k_ptr, q_weight_ptr, k_out_ptr,", "value"),
    "not_rounded_before_the_rotation": Mutant(
        ((".to(dtype)\n\n\n@triton.jit\ndef forward_heads", ".to(tl.bfloat16)\n\n\n@triton.jit\ndef forward_heads"),),
        ("value",),
        "float32",
    ),
    "nothing_without_heads_of_both": one(
        "if q.numel() + k.numel() == 0:\n        return outputs",
        "if q.numel() * k.numel() == 0:\n        return outputs",
        "argument_kinds",
    ),
    "position_is_the_row": one("row = tl.load(positions_ptr", "row = token + 0 * tl.load(positions_ptr", "value"),
    "gradient_mean_missing": one("dx = rstd * (g - n * mean)", "dx = rstd * g", "gradients"),
    "weight_gradient_of_the_last_token": Mutant(
        (("PROGRAMS = 1024", "PROGRAMS = 1"), ("return sums + d *", "return d *")), ("gradients",)
    ),
    "stored_a_head_too_many": one(
        "tl.store(rstd_ptr + head, rstd, head < heads)",
        "tl.store(rstd_ptr + head, rstd, head <= heads)",
        "guard_writes",
    ),
    "k_read_as_q_lies": one(
        "*q.stride(), *k.stride(), *q_weight.stride(), *k_weight.stride(), *strides_of_angles",
        "*q.stride(), *q.stride(), *q_weight.stride(), *k_weight.stride(), *strides_of_angles",
        "layouts",
    ),
    "position_outside_gives_nan": one("checks.positions_in_table(positions, len(cos))", "pass", "error_parity"),
    "heads_of_the_first_step_alone": one(
        "steps = max(cdiv(q.shape[1], q_heads), cdiv(k.shape[1], k_heads))", "steps = 1", "argument_kinds"
    ),
    "second_derivative_zero": one(*LYING),
}
