"""Wrong and right implementations of count_targets, shift_labels and next_token_loss."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.judge.pieces import Collected
from unsloth_ref import training
from unsloth_ref.types import IGNORE_INDEX

collected = Collected()


@collected.passes("count_targets")
def counted_on_shifted_labels(microbatches: Iterable[Tensor], ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Shifts the labels before it counts."""
    counts = [(training.shift_labels(labels, ignore_index) != ignore_index).sum() for labels in microbatches]
    return torch.stack([*counts, torch.zeros_like(counts[0])]).sum() if counts else torch.tensor(0)


@collected.fails("count_targets", "count")
def first_labels_counted(microbatches: Iterable[Tensor], ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Counts the first label of each row, which no position predicts: the loss is too small by rows / tokens."""
    return torch.tensor(sum(int((labels != ignore_index).sum()) for labels in microbatches))


@collected.fails("count_targets", "equal")
def ignore_index_unread(microbatches: Iterable[Tensor], ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Always uses the default of ignore_index."""
    return training.count_targets(microbatches)


@collected.fails("count_targets", "partition")
def last_microbatch_for_all(microbatches: Iterable[Tensor], ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Multiplies the count of the last microbatch by the number of microbatches."""
    found = list(microbatches)
    return training.count_targets(found[-1:], ignore_index) * len(found)


@collected.fails("count_targets", "count")
def a_python_integer(microbatches: Iterable[Tensor], ignore_index: int = IGNORE_INDEX) -> Any:
    """Returns a Python integer, which waits for the device."""
    return int(training.count_targets(microbatches, ignore_index))


@collected.passes("shift_labels")
def rolled(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Rolls the labels and overwrites the last column."""
    training.count_targets([labels])
    shifted = labels.roll(-1, 1)
    shifted[:, -1:] = ignore_index
    return shifted


@collected.fails("shift_labels", "equal")
def rolled_around(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The last position predicts the first."""
    return labels.roll(-1, 1)


@collected.fails("shift_labels", "inputs_untouched")
def shifted_in_place(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Overwrites the labels."""
    return labels.copy_(training.shift_labels(labels, ignore_index))


@collected.passes("next_token_loss")
def logits_shifted_by_copy(logits: Tensor, labels: Tensor, *, cross_entropy: Any, **options: Any) -> Tensor:
    """Copies the logits without the last position."""
    training.next_token_loss(logits, labels, cross_entropy=lambda *inputs, **keywords: torch.zeros(()))
    ignore_index = options.pop("ignore_index", IGNORE_INDEX)
    flat = logits[:, :-1].clone().flatten(0, 1)
    return cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=ignore_index, **options)


@collected.fails("next_token_loss", "value")
def not_shifted(logits: Tensor, labels: Tensor, *, cross_entropy: Any, **options: Any) -> Tensor:
    """Each token predicts itself."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


@collected.fails("next_token_loss", "value", "last_position_untrained")
def rows_run_on(logits: Tensor, labels: Tensor, *, cross_entropy: Any, **options: Any) -> Tensor:
    """The last position of a row predicts the next row."""
    return cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:], **options)


@collected.fails("next_token_loss", "value")
def own_count(logits: Tensor, labels: Tensor, *, num_items: Any = None, **options: Any) -> Tensor:
    """Ignores num_items, which gives a mean of means."""
    return training.next_token_loss(logits, labels, **options)


@collected.fails("next_token_loss", "value")
def divided_twice(logits: Tensor, labels: Tensor, *, num_items: Any = None, **options: Any) -> Tensor:
    """Divides by num_items twice."""
    return training.next_token_loss(logits, labels, num_items=num_items, **options) / (num_items or 1)


@collected.fails("next_token_loss", "value")
def smoothing_forgotten(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, **options: Any) -> Tensor:
    """Ignores label_smoothing."""
    return training.next_token_loss(logits, labels, **options)


@collected.fails("next_token_loss", "value")
def tensors_do_not_count(logits: Tensor, labels: Tensor, *, num_items: Any = None, **options: Any) -> Tensor:
    """Ignores num_items if it is a tensor, as it is in a training."""
    own = None if isinstance(num_items, Tensor) else num_items
    return training.next_token_loss(logits, labels, num_items=own, **options)


@collected.fails("next_token_loss", "value", "last_position_untrained")
def another_ignored_label(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, **options: Any
) -> Tensor:
    """Trains on the label that is to be ignored, unless it is the default."""
    return training.next_token_loss(logits, labels, **options)


@collected.fails("next_token_loss", "loss_in_float32")
def loss_in_16_bits(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Rounds the loss to the dtype of the logits."""
    return training.next_token_loss(logits, labels, **options).to(logits.dtype)
