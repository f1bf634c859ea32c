"""The loss of an evaluation: the mean over all targets of a data set, whatever its batches and its processes.

transformers averages the means of batches, which depends on their size, their padding and the number of processes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unsloth_fast.data.collator import PackedCollator, without_repeated
from unsloth_fast.data.lists import has_lists


class EvaluatedLoss:
    """The losses of the batches of one evaluation, weighted by their targets."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss and how many targets it has, both 0-dim."""
        self._batches.append((loss, targets))

    def mean(self, sum_over_devices: Callable[[Tensor], Tensor], *, finite_only: bool) -> float | None:
        """The mean over the targets of all batches on all devices.

        Args:
            sum_over_devices: adds up a tensor over all data-parallel processes.
            finite_only: whether to leave out batches whose loss is not finite, unless there are no others.

        Returns:
            None if no batch was added.
        """
        if not self._batches:
            return None
        losses, targets = (torch.stack(column).cpu().double() for column in zip(*self._batches, strict=True))
        kept = losses.isfinite() | (not finite_only)
        sums = losses * targets
        totals = torch.stack([sums[kept].sum(), targets[kept].sum(), sums.sum()])
        total, count, everything = sum_over_devices(totals).tolist()
        return total / count if count else everything  # 0, or what is not finite


def collator_for(dataset: object, usual: Any, padding: Any, *, row_per_document: bool) -> Any:
    """The collator of an evaluation.

    Args:
        dataset: which is evaluated.
        usual: the collator of training.
        padding: TRL's, which pads.
        row_per_document: whether the results are wanted in one row per document.

    Returns:
        The user's own collator; the padding one where rows are wanted of documents that are not packed; else the usual
        one, with the ends of examples in its batches.
    """
    if not isinstance(usual, PackedCollator):
        return usual
    if row_per_document and not has_lists(dataset, "seq_lengths"):
        return padding
    return replace(usual, with_ends=True)


def labels_counted_once(labels: Tensor, ends: Tensor | None, gradient_state: Any, rank: int) -> Tensor:
    """The labels of a batch; the targets of documents that another batch has already are taken out.

    accelerate repeats documents until the last batch of every process is full.

    Args:
        labels: [B, S].
        ends: [examples] int64, where each example ends if all are in one row; None for one row per example.
        gradient_state: `accelerate.state.GradientState`.
        rank: of this process among the data-parallel ones.
    """
    if not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
        return labels
    size = len(labels) if ends is None else len(ends)
    return without_repeated(labels, ends, gradient_state.remainder - rank * size)
