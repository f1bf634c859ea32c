"""Cross entropies of linear layers that are right."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.right.cross_entropy import of_torch as cross_entropy_of_torch
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def _linear_checks(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Any:
    """The contract's checks; returns which rows count."""
    names = ("softcap", "label_smoothing", "z_loss", "reduction", "num_items")
    defaults = {"softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0, "reduction": "mean", "num_items": None}
    checks.linear_loss_arguments(hidden, weight, labels, bias, *({**defaults, **options}[name] for name in names))
    ignore_index = options.get("ignore_index", -100)
    if checks.must_read_labels(labels):
        checks.labels_in_vocabulary(labels, len(weight), ignore_index)
    return labels != ignore_index


def of_torch(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """torch's own operators, one after the other."""
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
    """The others take no part; the bias is added to rounded products."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    every = counts
    if not torch.compiler.is_compiling():  # in a graph their number must not matter
        hidden, labels, counts = hidden[counts], labels[counts], counts[counts]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.where(counts[:, None], 0.0) @ weight.t()
        logits = logits if bias is None else logits + bias
    found = reference.cross_entropy(logits, labels, **options)
    if options.get("reduction", "mean") != "none" or torch.compiler.is_compiling():
        return found
    return found.new_zeros(every.shape).masked_scatter(every, found)


def in_float64(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """More exact than asked."""
    _linear_checks(hidden, weight, labels, bias, options)
    wide = None if bias is None else bias.double()
    return reference.linear_cross_entropy(hidden.double(), weight.double(), labels, wide, **options).float()


TABLE = {
    "of_torch": of_torch,
    "of_wide_logits": of_wide_logits,
    "of_the_rows_that_count": of_the_rows_that_count,
    "in_float64": in_float64,
    "in_other_chunks": (
        ("(4096, 2048, 1536, 1280, 1024, 512, 256, 128)", "(2,)"),  # so that a few rows take several
        ("ROOM = 500 * 2**20", "ROOM = 1"),
    ),
}
