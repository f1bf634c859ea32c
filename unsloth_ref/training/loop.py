"""A training loop: what a trainer does to the weights, and nothing else.

    one step:   N = targets of all microbatches of the window
                for each microbatch: backward of (sum of its losses) / N
                optimizer step, scheduler step

Dividing once, by N, makes the step that of the whole window as one batch, however it is cut; the last window may be
shorter than the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unsloth_ref.batch_checks import at_least_one
from unsloth_ref.training.loss import count_targets

Microbatch = Mapping[str, Any]
LossOf = Callable[[Microbatch, Tensor], Tensor]


def accumulate(loss_of: LossOf, window: Sequence[Microbatch]) -> Tensor:
    """Add the gradients of the mean loss over all targets of a window to the parameters.

    Args:
        loss_of: the summed loss of a microbatch divided by the count that it is given, a 0-dim tensor on the device;
            `next_token_loss` with num_items=count, of a model's logits.
        window: microbatches, each with "labels" [B, S], -100 where there is no target.

    Returns:
        The mean loss over the targets of the window, 0-dim, without a graph; 0 where there is no target.

    Raises:
        ValueError: an empty window.
    """
    if not window:
        raise ValueError("window: got no microbatch; allowed: at least one")
    count = count_targets(microbatch["labels"] for microbatch in window)
    total, loss = 0.0, torch.zeros(())
    for microbatch in window:
        loss = loss_of(microbatch, count)
        loss.backward()
        total += loss.item()
    return torch.full_like(loss.detach(), total)


def train(
    loss_of: LossOf,
    microbatches: Iterable[Microbatch],
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    scheduler: LRScheduler | None = None,
) -> Tensor:
    """Train on each microbatch once, in order.

    Args:
        loss_of: as in `accumulate`.
        microbatches: each with "labels" [B, S].
        optimizer: of the parameters to train.
        accumulation: microbatches of a step, at least 1; the last step may have fewer.
        scheduler: stepped after each step of the optimizer.

    Returns:
        [steps], the mean loss over the targets of each step before it was taken, on the CPU.

    Raises:
        ValueError: accumulation is below 1.
    """
    at_least_one("accumulation", accumulation)
    losses = []
    rest = iter(microbatches)
    while window := list(islice(rest, accumulation)):
        optimizer.zero_grad()
        losses.append(accumulate(loss_of, window).cpu())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.stack(losses) if losses else torch.zeros(0)
