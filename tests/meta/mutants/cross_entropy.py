"""Cross entropies that are wrong."""

from tests.meta.mutants.mutant import LYING, Mutant, one

TABLE = {
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
