"""Wrong gated activations with GELU."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "tanh_for_none": one('"gelu_tanh" if approximate == "tanh" else "gelu"', '"gelu_tanh"', "value"),
    "none_for_tanh": one('"gelu_tanh" if approximate == "tanh" else "gelu"', '"gelu"', "one_at_a_time"),
    "sigmoid_form": one("normal_distribution(gate)", "sigmoids(1.702 * gate)", "value"),
    "tail_cut_at_three": one(
        "tl.where(x >= 0, 1.0 - tail, tail)", "tl.where(x >= 0, 1.0 - tail, tl.where(x > -3.0, tail, 0.0))", "value"
    ),
    "tail_on_both_sides": one("tl.where(x >= 0, 1.0 - tail, tail)", "tail", "value"),
    "polynomial_one_term_short": one(
        "tail = 0.03831204026937485 * t - 0.16884352266788483", "tail = -0.16884352266788483", "value"
    ),
    "cube_dropped": one("1.5957691216057308 + 0.07135481282052102 * square", "1.5957691216057308", "one_at_a_time"),
    "slope_of_the_cube_not_tripled": one("0.21406443846156306", "0.07135481282052102", "one_at_a_time"),
    "slope_without_the_density": one(
        "slope = share + gate * (density * 0.3989422804014327)", "slope = share", "gradients"
    ),
    "density_of_another_width": one("-0.5 * x * x", "-0.5005 * x * x", "gradients"),
    "dup_without_the_share": one("dy * (gate * share)", "dy * gate", "gradients"),
    "activation_in_float16": one(
        "y = gate * share * up", "y = (gate * share).to(tl.float16).to(tl.float32) * up", "value"
    ),
    "up_of_any_size": one("checks.gated_arguments(gate, up)", "pass", "error_parity"),
    "tail_unwritten": one(
        "cdiv(matrix.shape[1], shape.columns)", "max(1, matrix.shape[1] // shape.columns)", "uninitialised", "value"
    ),
    "stored_past_the_end": one(
        "dgate.to(dgate_ptr.dtype.element_ty), inside",
        "dgate.to(dgate_ptr.dtype.element_ty), (row < rows) & (column <= columns)",
        "guard_writes",
    ),
    "second_derivative_zero": one(*LYING),
}
