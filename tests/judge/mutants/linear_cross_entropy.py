"""Wrong cross entropies of linear layers."""

from tests.judge.mutants.mutant import LYING, Mutant, one

# Two rows per chunk, so that a few rows take several chunks.
SMALL_CHUNKS = (
    ("(4096, 2048, 1536, 1280, 1024, 512, 256, 128)", "(2,)"),
    ("BUDGET_BYTES = 500 * 2**20", "BUDGET_BYTES = 1"),
)


def chunked(old: str, new: str, *properties: str, dtype: str = "float32") -> Mutant:
    """A mutant that shows only with several chunks."""
    return Mutant(((old, new), *SMALL_CHUNKS), properties, dtype)


TABLE = {
    "weight_of_the_last_chunk_alone": chunked("0 if self._first else 1, False", "0, False", "gradients"),
    "loss_of_the_first_chunk_alone": chunked("torch.stack(sums).sum()", "sums[0]", "value", "gradients"),
    "short_last_chunk_left_out": chunked(
        "for begin in range(0, rows, size)]", "for begin in range(0, rows, size) if begin + size <= rows]", "gradients"
    ),
    "each_chunk_a_mean_of_its_own": chunked(
        "chunk.logits, chunk.labels, items, options", "chunk.logits, chunk.labels, None, options", "gradients"
    ),
    "chunks_of_rows_before_compaction": chunked("self._index[span]", "span", "value", "gradients"),
    "label_read_after_it_is_overwritten": one(
        "            own, 1.0 - label_smoothing",
        "            tl.load(dlogits_ptr + label).to(tl.float32), 1.0 - label_smoothing",
        "gradients",
    ),
    "ignored_rows_in_the_mean": one("self.targets = float(rows)", "self.targets = float(len(labels))", "one_at_a_time"),
    "no_target_divides_by_zero": one(
        "hidden.new_zeros((), dtype=torch.float32)\n",
        'hidden.new_full((), float("nan"), dtype=torch.float32)\n',
        "gradients",
        "extents",
    ),
    "ignored_rows_keep_uninitialised_gradients": one(
        "hidden.new_zeros(hidden.shape if needs[0] else 0)",
        "hidden.new_empty(hidden.shape if needs[0] else 0)",
        "uninitialised",
        "gradients",
    ),
    "weight_uninitialised_without_a_target": one(
        "            self.weight.zero_()", "            pass", "uninitialised", "extents"
    ),
    "ignored_rows_reach_the_weight": one("if rows < len(labels):", "if rows < 0:", "gradients", "special_values"),
    "bias_left_out": one("if self._bias is None:", "if True:", "value"),
    "bias_without_gradient": one("self.bias += dlogits.sum(0, dtype=torch.float32)", "pass", "gradients"),
    "gradient_whatever_comes_back": one(
        "scaled(gradient, dloss, hidden.dtype)", "gradient.to(hidden.dtype)", "gradients"
    ),
    "gradients_scaled_in_place": one(
        "y = torch.empty_like(x, dtype=dtype)",
        "y = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)",
        "retained_backward",
    ),
    "scaled_after_rounding_dloss": one(
        "(x * tl.load(factor_ptr))", "(x * tl.load(factor_ptr).to(tl.float16).to(tl.float32))", "gradients"
    ),
    "logits_under_autocast": Mutant(
        (
            ("torch.mm(hidden, self._weight.t(), out=logits)", "logits.copy_(hidden @ self._weight.t())"),
            (
                "torch.addmm(self._bias, hidden, self._weight.t(), out=logits)",
                "logits.copy_(hidden @ self._weight.t() + self._bias)",
            ),
        ),
        ("autocast",),
    ),
    "rows_get_dloss_of_others": one("dlosses[chunk.rows]", "dlosses[: len(chunk.hidden)]", "argument_kinds"),
    "rows_put_where_others_were": one("losses[chunk.rows], lse", "losses[: len(chunk.hidden)], lse", "argument_kinds"),
    # Where labels are not checked, as on a GPU, the loss of a bad one is NaN.
    "bad_label_gives_nan": Mutant(
        (("checks.labels_in_vocabulary(labels, weight.shape[0], options.ignore_index)", "pass"),),
        ("error_parity",),
        device="cpu",
    ),
    "second_derivative_zero": one(*LYING),
}
