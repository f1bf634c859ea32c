"""Right cross entropies of linear layers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.right.cross_entropy import of_torch as cross_entropy_of_torch
from unsloth_ref import checks
from unsloth_ref import kernels as reference
from unsloth_ref.types import IGNORE_INDEX


def _linear_checks(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Any:
    """Run the contract's checks; returns which rows are not ignored."""
    checks.reduction_arguments(options.get("reduction", "mean"), options.get("num_items"))
    others = (options.get(name, 0.0) for name in ("softcap", "label_smoothing", "z_loss"))
    checks.linear_loss_arguments(hidden, weight, labels, bias, *others)
    ignore_index = options.get("ignore_index", IGNORE_INDEX)
    if checks.values_are_checked(labels):
        checks.labels_in_vocabulary(labels, len(weight), ignore_index)
    return labels != ignore_index


def of_torch(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """torch's own operators."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.where(counts[:, None], 0.0), weight, bias)
    return cross_entropy_of_torch(logits, labels.long(), **options)


def of_wide_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Neither logits nor their gradient are rounded."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float().where(counts[:, None], 0.0) @ weight.float().t()
        logits = logits if bias is None else logits + bias.float()
    return reference.cross_entropy(logits, labels, **options)


def of_the_rows_that_count(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Ignored rows take no part; the bias is added to rounded products."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    every = counts
    if not torch.compiler.is_compiling():  # a graph must not depend on their number
        hidden, labels, counts = hidden[counts], labels[counts], counts[counts]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.where(counts[:, None], 0.0) @ weight.t()
        logits = logits if bias is None else logits + bias
    found = reference.cross_entropy(logits, labels, **options)
    if options.get("reduction", "mean") != "none" or torch.compiler.is_compiling():
        return found
    return found.new_zeros(every.shape).masked_scatter(every, found)


def in_float64(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """More exact than required."""
    _linear_checks(hidden, weight, labels, bias, options)
    wide = None if bias is None else bias.double()
    return reference.linear_cross_entropy(hidden.double(), weight.double(), labels, wide, **options).float()


TABLE = {
    "of_torch": of_torch,
    "of_wide_logits": of_wide_logits,
    "of_the_rows_that_count": of_the_rows_that_count,
    "in_float64": in_float64,
    "in_other_chunks": (
        ("(4096, 2048, 1536, 1280, 1024, 512, 256, 128)", "(2,)"),  # so that a few rows take several chunks
        ("BUDGET_BYTES = 500 * 2**20", "BUDGET_BYTES = 1"),
    ),
}
