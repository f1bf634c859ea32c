"""Counts, losses and steps of training, wrong and right."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tests.judge.pieces import Collected
from unsloth_ref import training
from unsloth_ref.training.loop import LossOf, Microbatch

collected = Collected()


@collected.passes("count_targets")
def counted_on_shifted_labels(microbatches: Iterable[Tensor], ignore_index: int = -100) -> Tensor:
    """Shifts, then counts."""
    counts = [(training.shift_labels(labels, ignore_index) != ignore_index).sum() for labels in microbatches]
    return torch.stack([*counts, torch.zeros_like(counts[0])]).sum() if counts else torch.tensor(0)


@collected.fails("count_targets", "count")
def first_labels_counted(microbatches: Iterable[Tensor], ignore_index: int = -100) -> Tensor:
    """All labels, although nothing foretells the first of a row: the loss shrinks by rows over tokens."""
    return torch.tensor(sum(int((labels != ignore_index).sum()) for labels in microbatches))


@collected.fails("count_targets", "equal")
def ignore_index_unread(microbatches: Iterable[Tensor], ignore_index: int = -100) -> Tensor:
    """-100 whatever was said."""
    return training.count_targets(microbatches)


@collected.fails("count_targets", "partition")
def last_microbatch_for_all(microbatches: Iterable[Tensor], ignore_index: int = -100) -> Tensor:
    """The last microbatch, times their number."""
    found = list(microbatches)
    return training.count_targets(found[-1:], ignore_index) * len(found)


@collected.fails("count_targets", "count")
def a_plain_number(microbatches: Iterable[Tensor], ignore_index: int = -100) -> Any:
    """A number, which waits for the device."""
    return int(training.count_targets(microbatches, ignore_index))


@collected.passes("shift_labels")
def rolled(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Rolled, the last column overwritten."""
    training.count_targets([labels])
    shifted = labels.roll(-1, 1)
    shifted[:, -1:] = ignore_index
    return shifted


@collected.fails("shift_labels", "equal")
def rolled_around(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The last position foretells the first."""
    return labels.roll(-1, 1)


@collected.fails("shift_labels", "inputs_untouched")
def shifted_in_place(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Where they lie."""
    return labels.copy_(training.shift_labels(labels, ignore_index))


@collected.passes("next_token_loss")
def logits_shifted_by_copy(logits: Tensor, labels: Tensor, *, cross_entropy: Any, **options: Any) -> Tensor:
    """A copy of the logits without the last position."""
    training.next_token_loss(logits, labels, cross_entropy=lambda *inputs, **keywords: torch.zeros(()))
    ignore_index = options.pop("ignore_index", -100)
    flat = logits[:, :-1].clone().flatten(0, 1)
    return cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=ignore_index, **options)


@collected.fails("next_token_loss", "value")
def not_shifted(logits: Tensor, labels: Tensor, *, cross_entropy: Any, **options: Any) -> Tensor:
    """Each token foretells itself."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


@collected.fails("next_token_loss", "value", "last_position_untrained")
def rows_run_on(logits: Tensor, labels: Tensor, *, cross_entropy: Any, **options: Any) -> Tensor:
    """The last position of a row foretells the next row."""
    return cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:], **options)


@collected.fails("next_token_loss", "value")
def own_count(logits: Tensor, labels: Tensor, *, num_items: Any = None, **options: Any) -> Tensor:
    """num_items is not looked at: a mean of means."""
    return training.next_token_loss(logits, labels, **options)


@collected.fails("next_token_loss", "value")
def smoothing_forgotten(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, **options: Any) -> Tensor:
    """No label smoothing."""
    return training.next_token_loss(logits, labels, **options)


@collected.passes("accumulate")
def summed_graph(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """One backward pass through the sum of all losses."""
    if not window:
        raise ValueError("window: nothing")
    count = training.count_targets(microbatch["labels"] for microbatch in window)
    total = torch.stack([loss_of(microbatch, count) for microbatch in window]).sum()
    total.backward()
    return total.detach()


@collected.fails("accumulate", "accumulated_equals_full_batch")
def mean_of_means(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """Each microbatch weighs the same, however few targets it has."""
    losses = [training.accumulate(loss_of, [microbatch]) for microbatch in window]
    return torch.stack(losses).mean()


@collected.fails("accumulate", "close")
def divided_twice(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """By the count, and by the number of microbatches."""
    return training.accumulate(lambda microbatch, count: loss_of(microbatch, count) / len(window), window)


@collected.fails("accumulate", "close")
def reported_of_the_last(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """The gradients of all, the loss of the last microbatch."""
    last = []

    def kept(microbatch: Microbatch, count: Tensor) -> Tensor:
        last[:] = [loss_of(microbatch, count)]
        return last[0]

    training.accumulate(kept, window)
    return last[0].detach()


@collected.fails("accumulate", "close")
def with_its_graph(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """Keeps the graph of every step in memory."""
    count = training.count_targets(microbatch["labels"] for microbatch in window)
    losses = [loss_of(microbatch, count) for microbatch in window]
    for loss in losses:
        loss.backward(retain_graph=True)
    return torch.stack(losses).sum()


@collected.fails("accumulate", "adds")
def starts_anew(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """What was there is lost."""
    parameters = list(loss_of.__self__.parameters())  # type: ignore[attr-defined]
    for parameter in parameters:
        parameter.grad = None
    return training.accumulate(loss_of, window)


@collected.passes("train")
def step_by_step(
    loss_of: LossOf, microbatches: Iterable[Microbatch], optimizer: Any, *, accumulation: int = 1, scheduler: Any = None
) -> Tensor:
    """The reference, a window at a time."""
    rest, losses = iter(microbatches), [training.train(loss_of, [], optimizer, accumulation=accumulation)]
    while window := list(islice(rest, accumulation)):
        optimizer.zero_grad(set_to_none=False)
        losses.append(summed_graph.accumulate(loss_of, window)[None])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.cat(losses[1:]) if losses[1:] else losses[0]


def stepped(loss_of: LossOf, windows: Iterable[Sequence[Microbatch]], optimizer: Any, scheduler: Any) -> Tensor:
    """One step a window."""
    losses = []
    for window in windows:
        losses.append(training.accumulate(loss_of, window))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.stack(losses) if losses else torch.zeros(0)


def cut(microbatches: Iterable[Microbatch], size: int) -> list[list[Microbatch]]:
    """Windows of this size, the last shorter."""
    found = list(microbatches)
    return [found[first : first + size] for first in range(0, len(found), size)]


@collected.fails("train", "close")
def short_window_dropped(
    loss_of: LossOf, microbatches: Iterable[Microbatch], optimizer: Any, *, accumulation: int = 1, **options: Any
) -> Tensor:
    """What is left over at the end trains nothing."""
    found = list(microbatches)
    whole = found[: len(found) // accumulation * accumulation]
    return training.train(loss_of, whole, optimizer, accumulation=accumulation, **options)


@collected.fails("train", "close")
def short_window_at_full_weight(
    loss_of: LossOf, microbatches: Iterable[Microbatch], optimizer: Any, *, accumulation: int = 1, **options: Any
) -> Tensor:
    """Divides the leftover by the number of microbatches that a whole step has."""
    found = list(microbatches)
    short = found[len(found) // accumulation * accumulation :]

    def scaled(microbatch: Microbatch, count: Tensor) -> Tensor:
        among = any(microbatch is one for one in short)
        return loss_of(microbatch, count) * (len(short) / accumulation if among else 1)

    return training.train(scaled, found, optimizer, accumulation=accumulation, **options)


@collected.fails("train", "close", "fresh_gradients")
def gradients_pile_up(
    loss_of: LossOf,
    microbatches: Iterable[Microbatch],
    optimizer: Any,
    *,
    accumulation: int = 1,
    scheduler: Any = None,
) -> Tensor:
    """No zero_grad."""
    return stepped(loss_of, cut(microbatches, accumulation), optimizer, scheduler)


@collected.fails("train", "fresh_gradients")
def cleared_after_the_step(
    loss_of: LossOf,
    microbatches: Iterable[Microbatch],
    optimizer: Any,
    *,
    accumulation: int = 1,
    scheduler: Any = None,
) -> Tensor:
    """What is there before the first step is in it."""
    losses = []
    for window in cut(microbatches, accumulation):
        losses.append(stepped(loss_of, [window], optimizer, scheduler))
        optimizer.zero_grad()
    return torch.cat(losses) if losses else torch.zeros(0)


@collected.fails("train", "close")
def scheduler_first(
    loss_of: LossOf,
    microbatches: Iterable[Microbatch],
    optimizer: Any,
    *,
    accumulation: int = 1,
    scheduler: Any = None,
) -> Tensor:
    """The first step has the second rate."""
    losses = []
    for window in cut(microbatches, accumulation):
        if scheduler is not None:
            optimizer._opt_called = True  # or torch would warn of this very mistake
            scheduler.step()
        losses.append(training.train(loss_of, window, optimizer, accumulation=len(window)))
    return torch.cat(losses) if losses else torch.zeros(0)


@collected.fails("train", "close")
def a_step_a_microbatch(
    loss_of: LossOf, microbatches: Iterable[Microbatch], optimizer: Any, *, accumulation: int = 1, **options: Any
) -> Tensor:
    """Accumulation is not looked at."""
    return training.train(loss_of, microbatches, optimizer, **options)
