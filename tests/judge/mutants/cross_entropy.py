"""Wrong cross entropies."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "sum_not_rescaled": one("total = total * exp(maximum - base)", "total = total", "extents"),
    "maximum_not_subtracted": one(
        "higher = tl.maximum(maximum, tl.max(z, 1))", "higher = tl.zeros_like(maximum)", "value"
    ),
    "groups_merged_without_their_maxima": one(
        "tl.sum(total * exp(maximum - finite_or_zero(highest)), 0)", "tl.sum(total, 0)", "value"
    ),
    "segments_merged_without_their_maxima": one(
        'merged(tl.where(sums == 0.0, float("-inf"), maxima), sums)', "tl.max(maxima, 0), tl.sum(sums, 0)", "extents"
    ),
    "last_segment_left_out": one("inside = segment < segments", "inside = segment < segments - 1", "extents"),
    "last_column_of_a_segment_left_out": one(
        "inside = column < end\n    pointer", "inside = column < end - 1\n    pointer", "gradients"
    ),
    "tail_counted_as_zero_logits": one(
        'z = tl.where(inside, z, float("-inf"))', "z = tl.where(inside, z, 0.0)", "value"
    ),
    "logits_in_float16": one(
        "z = capped(x, logit_scale, softcap, SCALED, SOFTCAP)",
        "z = capped(x, logit_scale, softcap, SCALED, SOFTCAP).to(tl.float16).to(tl.float32)",
        "value",
    ),
    "target_one_class_off": one(
        "dlogits_ptr + label, own_dx", "dlogits_ptr + (label + 1) % columns, own_dx", "gradients"
    ),
    "smoothing_over_one_less": one("label_smoothing / columns", "label_smoothing / (columns - 0.5)", "gradients"),
    "z_loss_without_gradient": one("dz *= 1.0 + 2.0 * z_loss * lse", "dz *= 1.0", "gradients"),
    "z_loss_gradient_halved": one("1.0 + 2.0 * z_loss * lse", "1.0 + z_loss * lse", "gradients"),
    "softcap_without_gradient": one("dz *= tanh_derivative(x * (logit_scale / softcap))", "dz *= 1.0", "gradients"),
    "reciprocal_of_one_step": one(
        "return tl.fma(found, tl.fma(-x, found, 1.0), found)", "return found", "value", "one_at_a_time"
    ),
    "scale_after_the_cap": one(
        "softcap * tanh(x * (logit_scale / softcap))", "logit_scale * softcap * tanh(x / softcap)", "value"
    ),
    "gradient_without_the_scale": one("dz * (dloss * logit_scale)", "dz * dloss", "gradients"),
    "dloss_read_as_contiguous": one("row * dloss_stride", "row", "gradients"),
    "ignored_rows_in_the_mean": one("(labels.long() != ignore_index).sum()", "labels.numel()", "checkpoint"),
    "ignored_rows_in_the_early_mean": one("((row < rows) & (label != ignore_index))", "(row < rows)", "gradients"),
    "no_target_divides_by_zero": one("tl.where(number < 1.0, 1.0, number)", "number", "extents"),
    "ignored_row_leaks_nan": one(
        'value = tl.where(label == ignore_index, 0.0, float("nan"))',
        "value = 0.0 * tl.load(logits_ptr + columns // 2).to(tl.float32)",
        "special_values",
    ),
    "last_row_unwritten": one("tiles = rows * tiles_per_row", "tiles = (rows - 1) * tiles_per_row", "uninitialised"),
    "stored_past_the_end": one(
        "inside = column < end\n            x", "inside = column <= end\n            x", "guard_writes"
    ),
    "early_gradient_of_the_sum": one("dloss = tl.div_rn(1.0, items)", "dloss = 1.0", "gradients"),
    "early_gradient_whatever_comes_back": one(
        "if tl.load(dloss_ptr) == 1.0:", "if tl.load(dloss_ptr) < 1e9:", "gradients"
    ),
    "offsets_in_32_bits": one(
        "    logits_ptr += row * row_stride\n    d",
        "    logits_ptr += (row * row_stride).to(tl.int32)\n    d",
        "int64_offsets",
    ),
    # Where labels are not checked, as on a GPU, the loss of a bad one is NaN.
    "bad_label_gives_nan": Mutant(
        (("checks.labels_in_vocabulary(labels, logits.shape[1], options.ignore_index)", "pass"),),
        ("error_parity",),
        device="cpu",
    ),
    # Triton's interpreter runs programs one after another: the first ones of a row leave their segments.
    "left_segments_forgotten": Mutant((("& MARK) != 0:", "& MARK) < 0:"),), ("extents",), device="cpu"),
    # Needs a label smoothing and a vocabulary of several segments.
    "scratch_without_the_smoothing": Mutant(
        (("1 + (1 + (options.label_smoothing != 0)) * segments", "1 + segments"),),
        ("guard_writes",),
        rare=True,
    ),
    "second_derivative_zero": one(*LYING),
}
