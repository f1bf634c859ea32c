"""Wrong packed attentions."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "heads_share_by_remainder": one(
        "v_ptr += begin * v_token + head // group * v_head\n    query",
        "v_ptr += begin * v_token + head % (heads // group) * v_head\n    query",
        "extents",
    ),
    "window_of_one_more": one(
        "tl.where(visible(query, key, length, window, WINDOW), z",
        "tl.where(visible(query, key, length, window + 1, WINDOW), z",
        "one_at_a_time",
    ),
    "window_forgotten_in_dk": one(
        "> length) | WINDOW\n            p, ds = weights_and_slopes(\n"
        "                q, k, v, do, lse[:, None], delta[:, None], query, key, length, window,",
        "> length) | WINDOW\n            p, ds = weights_and_slopes(\n"
        "                q, k, v, do, lse[:, None], delta[:, None], query, key, length, length,",
        "one_at_a_time",
    ),
    "window_in_the_last_tile_alone": one(
        "if (key_start + COLUMNS > start) | WINDOW:", "if key_start + COLUMNS > start:", "one_at_a_time"
    ),
    "last_keys_of_a_tile_seen_by_all": one(
        "if (key_start + COLUMNS > start)", "if (key_start >= start + COLUMNS)", "value"
    ),
    "keys_seen_by_earlier_queries": one("(start + COLUMNS - 1 > query_start)", "(start > query_start)", "gradients"),
    "window_that_skips_a_tile": one(
        "out = tl.full([ROWS, WIDTH], 0.0, tl.float32)\n    first = tl.maximum(start - window + 1, 0)",
        "out = tl.full([ROWS, WIDTH], 0.0, tl.float32)\n    first = tl.maximum(start - window + COLUMNS, 0)",
        "one_at_a_time",
    ),
    "queries_beyond_the_window_dropped": one(
        "start + COLUMNS + window - 1)", "start + COLUMNS + window - 33)", "one_at_a_time"
    ),
    "softcap_without_gradient": one("ds *= tanh_derivative(dots * (scale / softcap))", "ds *= 1.0", "one_at_a_time"),
    "scale_after_the_cap": one(
        "tanh(dots * (scale / softcap)) * (softcap * LOG2E)",
        "tanh(dots / softcap) * (softcap * scale * LOG2E)",
        "one_at_a_time",
    ),
    "power_of_two_of_natural_scores": one("dots * (scale * LOG2E)", "dots * scale", "value"),
    "dq_without_the_scale": one("dq_ptr + mine, dq * scale", "dq_ptr + mine, dq", "gradients"),
    "delta_forgotten": one('input_precision="ieee") - delta)', 'input_precision="ieee"))', "gradients"),
    "documents_run_on": one(
        "end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + low + 1), 0), tokens)",
        "end = tokens + 0 * begin",
        "value",
    ),
    "document_of_the_tile_before": one("// ROWS + middle <= tile", "// ROWS + middle < tile", "value"),
    "last_tile_not_started": one(
        'tiles = tokens // tile["ROWS"] + documents', 'tiles = tokens // tile["ROWS"] + documents - 1', "uninitialised"
    ),
    "heads_in_32_bits": one(
        "head = (tl.program_id(0) % heads).to(tl.int64)", "head = tl.program_id(0) % heads", "int64_offsets"
    ),
    "neighbour_read": one(
        "(row < length)[:, None] & (column < width)[None, :], other=0.0)",
        "(row <= length)[:, None] & (column < width)[None, :], other=0.0)",
        "argument_kinds",
    ),
    "stored_past_the_document": one(
        "inside = (row < length)[:, None] & (column < width)[None, :]",
        "inside = (row <= length)[:, None] & (column < width)[None, :]",
        "guard_writes",
    ),
    "probabilities_in_float16": one("tl.dot(p.to(v.dtype), v", "tl.dot(p.to(tl.float16).to(v.dtype), v", "value"),
    "sum_not_rescaled": one("total = total * shrink", "total = total", "extents"),
    "output_not_rescaled": one("out = out * shrink[:, None] +", "out = out +", "extents"),
    "dv_of_the_last_queries": one("dv += tl.dot(", "dv = tl.dot(", "gradients"),
    "dk_of_the_first_head": one("for index in range(0, group)", "for index in range(0, 1)", "extents"),
    "dk_of_the_first_eight_heads": one(
        "head = kv_head * group + index\n", "head = kv_head * group + index % 8\n", "extents"
    ),
    "k_read_as_v_lies": one("*strides_of(q, k, v), scale", "*strides_of(q, v, v), scale", "layouts"),
    "grad_output_read_as_the_output_lies": one("strides_of(q, k, v, do)", "strides_of(q, k, v, out)", "layouts"),
    "columns_read_as_if_in_one_piece": one(
        "tensor if tensor.stride(2) == 1 else tensor.contiguous()", "tensor", "layouts"
    ),
    "sinks_forgotten": one(
        "        highest = tl.full([ROWS], 0.0, tl.float32) + tl.load", "        _ = tl.load", "extents"
    ),
    "sink_of_the_key_head": one(
        "        highest = tl.full([ROWS], 0.0, tl.float32) + tl.load(sinks_ptr + head)",
        "        highest = tl.full([ROWS], 0.0, tl.float32) + tl.load(sinks_ptr + head // group)",
        "value",
    ),
    "sinks_are_scaled": one(
        "tl.load(sinks_ptr + head).to(tl.float32) * LOG2E\n",
        "tl.load(sinks_ptr + head).to(tl.float32) * LOG2E * scale\n",
        "value",
    ),
    "sinks_without_gradient": one("-tl.sum(tl.where(query < length, p * delta, 0.0))", "0.0 * tl.sum(p)", "gradients"),
    "sink_gradient_of_rows_outside": one("tl.where(query < length, p * delta, 0.0)", "p * delta", "argument_kinds"),
    "sink_gradient_of_the_last_tile": one("parts.sum(0, dtype=torch.float64)", "parts[0]", "gradients"),
    "documents_of_any_kind": one(
        "document_checks.documents_fit(cu_seqlens, q.shape[0], max_seqlen)", "pass", "error_parity"
    ),
    "second_derivative_zero": one(*LYING),
}
