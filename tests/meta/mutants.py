"""Wrong kernels: the project's own with one thing changed, most of them mistakes that published kernels have had.

Each is a backend: `tests.meta.mutants.rms_norm_eps_hard_coded`.
"""

from dataclasses import dataclass
from types import ModuleType

from tests.meta.sources import Edit, changed


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel.

    Attributes:
        edits: what is changed.
        laws: properties that may find it, one of which must.
        dtype: in which to look.
    """

    edits: tuple[Edit, ...]
    laws: tuple[str, ...]
    dtype: str = "float32"


def one(old: str, new: str, *laws: str, dtype: str = "float32") -> Mutant:
    """A mutant of one edit."""
    return Mutant(((old, new),), laws, dtype)


# Without its guard, a derivative of the gradient is silently zero.
LYING = (
    "return tuple(None if r is None else Undifferentiable.apply(r, grad_output, *saved) for r in results)",
    "return results",
    "double_backward",
)

RMS_NORM = {
    "neighbours_columns_read": one(
        "inside = (row < rows) & (column < columns)", "inside = (row < rows) & (column < 2 * columns)", "value"
    ),
    "stored_past_the_end": one(
        "dx.to(dtype), (row < rows) & (column < columns)",
        "dx.to(dtype), (row < rows) & (column <= columns)",
        "guard_writes",
    ),
    "eps_outside_the_root": one("tl.sqrt_rn(mean + eps)", "(tl.sqrt_rn(mean) + eps)", "value"),
    "eps_hard_coded": one("mean + eps", "mean + 1e-6", "value"),
    "mean_over_one_less": one(
        "tl.sum(squares, 1, keep_dims=True) / columns", "tl.sum(squares, 1, keep_dims=True) / (columns - 1)", "value"
    ),
    "weight_one_column_off": one(
        "weight_ptr + column * weight_stride, column < columns",
        "weight_ptr + (column + 1) * weight_stride, column + 1 < columns",
        "value",
    ),
    "weight_read_as_contiguous": one("weight_ptr + column * weight_stride", "weight_ptr + column", "layouts"),
    "offset_ignored": one("return weight + offset", "return weight", "value"),
    "squares_in_float16": one(
        "squares = x * x", "squares = (x * x).to(dtype).to(tl.float32)", "value", dtype="float16"
    ),
    "gradient_mean_scaled": one(
        "tl.sum(g * normed, 1, keep_dims=True) / columns",
        "tl.sum(g * normed, 1, keep_dims=True) / columns * 1.03",
        "gradients",
    ),
    "dweight_without_the_last_row": one(
        "dweight += tl.sum(dy * rounded(normed, dtype, LLAMA), 0, keep_dims=True)",
        "dweight += tl.sum(tl.where(row < rows - 1, dy * rounded(normed, dtype, LLAMA), 0.0), 0, keep_dims=True)",
        "gradients",
    ),
    "dweight_tail_unwritten": one("sums = cdiv(columns, width)", "sums = columns // width", "uninitialised"),
    "long_rows_cut_short": one(
        "range(COLUMNS, columns, COLUMNS)", "range(COLUMNS, columns - COLUMNS + 1, COLUMNS)", "extents"
    ),
    "offsets_in_32_bits": one("row * row_stride", "(row * row_stride).to(tl.int32)", "int64_offsets"),
    "x_read_as_contiguous": one(
        "rows, columns, *x.stride(), *weight.stride(), eps",
        "rows, columns, columns, 1, *weight.stride(), eps",
        "layouts",
    ),
    "grad_output_read_as_contiguous": one("(*dy.stride(), *x.stride()", "(columns, 1, *x.stride()", "layouts"),
    "dx_lost_with_a_frozen_weight": one("dx if need_dx else None", "dx if need_dweight else None", "gradients"),
    "rows_mixed": one(
        "mean = tl.sum(g * normed, 1, keep_dims=True) / columns",
        "mean = tl.sum(tl.sum(g * normed, 1, keep_dims=True), 0, keep_dims=True) / columns",
        "row_independence",
    ),
    "weight_of_any_size": one("checks.norm_arguments(x, weight, eps)", "pass", "error_parity"),
    "saved_tensor_used_up": one(
        "    if need_dweight:\n        height",
        "    rstd.data.zero_()\n    if need_dweight:\n        height",
        "retained_backward",
    ),
    "second_derivative_zero": one(*LYING),
}

SWIGLU = {
    "up_for_gate_in_the_sigmoid": one("sigmoid, _ = sigmoids(gate)", "sigmoid, _ = sigmoids(up)", "value"),
    "gelu_constant": one("sigmoid, _ = sigmoids(gate)", "sigmoid, _ = sigmoids(1.702 * gate)", "value"),
    "activation_in_float16": one("gate * sigmoid * up", "(gate * sigmoid).to(tl.float16).to(tl.float32) * up", "value"),
    "ln2_in_three_digits": one("x - whole * 0.693359375", "x - whole * 0.693", "value"),
    "dgate_without_the_derivative_of_the_sigmoid": one("(1.0 + gate * complement)", "1.0", "gradients"),
    "dgate_with_the_sigmoid_itself": one("(1.0 + gate * complement)", "(1.0 + gate * sigmoid)", "gradients"),
    "dup_without_gate": one("dy * (gate * sigmoid)", "dy * sigmoid", "gradients"),
    "dup_scaled": one("dy * (gate * sigmoid)", "dy * (gate * sigmoid) * 1.03", "gradients"),
    "up_of_any_size": one("checks.gated_arguments(gate, up)", "pass", "error_parity"),
    "needs_swapped": one("need_dgate, need_dup = ctx", "need_dup, need_dgate = ctx", "gradients"),
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
        "dgate, dup = swiglu_backward_fake(dy, gate, up, need_dgate, need_dup)",
        "dgate, dup = gate, up",
        "inputs_untouched",
    ),
    "offsets_in_32_bits": one(
        "gate = tl.load(gate_ptr + row * gate_row + column * gate_column, inside, other=0.0).to(tl.float32)\n    up =",
        "gate = tl.load(gate_ptr + (row * gate_row).to(tl.int32) + column * gate_column, "
        "inside, other=0.0).to(tl.float32)\n    up =",
        "int64_offsets",
    ),
    "grad_output_read_as_the_gate_lies": one(
        "*dy.stride(), *gate.stride()", "*gate.stride(), *gate.stride()", "layouts"
    ),
    "output_in_float32": one(
        "y = gate.new_empty(gate.shape)",
        "y = gate.new_empty(gate.shape, dtype=torch.float32)",
        "metadata",
        dtype="float16",
    ),
    "fake_of_another_shape": one(
        "return gate.new_empty(gate.shape)\n\n\ndef", "return gate.new_empty(gate.numel())\n\n\ndef", "opcheck"
    ),
    "second_derivative_zero": one(*LYING),
}

CROSS_ENTROPY = {
    "sum_not_rescaled": one("total = total * tl.exp(maximum - base)", "total = total", "extents"),
    "maximum_not_subtracted": Mutant(
        (
            ("base = finite_or_zero(higher)", "base = 0.0 * higher"),
            ("base[:, None]", "0.0"),
            ("total * tl.exp(maximum - base) +", "total +"),
            ("base + tl.log(tl.sum(total * tl.exp(maximum - base), 0))", "tl.log(tl.sum(total, 0))"),
        ),
        ("one_at_a_time",),
    ),
    "groups_merged_without_their_maxima": one("tl.sum(total * tl.exp(maximum - base), 0)", "tl.sum(total, 0)", "value"),
    "tail_counted_as_zero_logits": one(
        'z = tl.where(inside, z, float("-inf"))', "z = tl.where(inside, z, 0.0)", "value"
    ),
    "logits_in_float16": one(
        "z = capped(x, logit_scale, softcap, SOFTCAP)",
        "z = capped(x, logit_scale, softcap, SOFTCAP).to(tl.float16).to(tl.float32)",
        "value",
    ),
    "target_one_class_off": one("column == label", "column == label + 1", "gradients"),
    "smoothing_over_one_less": one("label_smoothing / columns", "label_smoothing / (columns - 0.5)", "gradients"),
    "z_loss_without_gradient": one("dz *= 1.0 + 2.0 * z_loss * lse", "dz *= 1.0", "gradients"),
    "z_loss_gradient_halved": one("1.0 + 2.0 * z_loss * lse", "1.0 + z_loss * lse", "gradients"),
    "softcap_without_gradient": one("dz *= tanh_derivative(x * (logit_scale / softcap))", "dz *= 1.0", "gradients"),
    "scale_after_the_cap": one(
        "softcap * tanh(x * (logit_scale / softcap))", "logit_scale * softcap * tanh(x / softcap)", "value"
    ),
    "gradient_without_the_scale": one("row * dloss_stride) * logit_scale", "row * dloss_stride)", "gradients"),
    "dloss_read_as_contiguous": one("row * dloss_stride", "row", "gradients"),
    "ignored_rows_in_the_mean": one("(labels.long() != ignore_index).sum()", "labels.numel()", "value"),
    "no_target_divides_by_zero": one(".clamp(min=1)", "", "extents"),
    "ignored_row_leaks_nan": one(
        "tl.zeros([COLUMNS], dtype), inside)",
        "(0.0 * tl.load(logits_ptr + row * row_stride + column * column_stride, inside, other=0.0)).to(dtype), inside)",
        "special_values",
    ),
    "last_row_unwritten": one(
        "cross_entropy_backward_kernel, rows * tiles_a_row",
        "cross_entropy_backward_kernel, (rows - 1) * tiles_a_row",
        "uninitialised",
    ),
    "stored_past_the_end": one(
        "(dz * dloss).to(dtype), inside", "(dz * dloss).to(dtype), column <= columns", "guard_writes"
    ),
    "offsets_in_32_bits": one(
        "logits_ptr += row * row_stride", "logits_ptr += (row * row_stride).to(tl.int32)", "int64_offsets"
    ),
    "bad_label_gives_nan": one(
        "checks.labels_in_vocabulary(labels, logits.shape[1], ignore_index)", "pass", "error_parity"
    ),
    "second_derivative_zero": one(*LYING),
}

MUTANTS = {
    f"{op}_{name}": (op, mutant)
    for op, table in (("rms_norm", RMS_NORM), ("swiglu", SWIGLU), ("cross_entropy", CROSS_ENTROPY))
    for name, mutant in table.items()
}


def __getattr__(name: str) -> ModuleType:
    if name not in MUTANTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op, mutant = MUTANTS[name]
    module = globals()[name] = changed(op, name, mutant.edits)
    return module
