"""The loss of a training step: the token at t + 1 is the target of the logits at t.

    loss = sum over microbatches and targets of -log p(target) / N        N: the targets of all microbatches together

Dividing by N once makes gradient accumulation exact. A mean of the microbatches' means would give more weight to the
targets of those that have few.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import Microbatches


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The target of each position: the label of the next one; the last position has none.

    Args:
        labels: [B, S], int32 or int64.
        ignore_index: the label of a position that does not count.

    Returns:
        [B, S] in labels.dtype, the last column ignore_index.

    Raises:
        ValueError: labels is not [B, S].
        TypeError: labels is not int32 or int64.
    """
    checks.dimensions("labels", labels, 2, "[B, S]")
    checks.dtype("labels", labels, checks.INTEGERS)
    shifted = torch.full_like(labels, ignore_index)
    for position in range(labels.shape[1] - 1):
        shifted[:, position] = labels[:, position + 1]
    return shifted


def count_targets(microbatches: Microbatches, ignore_index: int = -100) -> Tensor:
    """How many targets all microbatches have together: labels after the first of each row that are not ignore_index.

    Args:
        microbatches: labels [B, S] each, int32 or int64, sizes free, all on one device.
        ignore_index: the label of a position that does not count.

    Returns:
        0-dim int64, on the device of the labels (the CPU where there are none).

    Raises:
        ValueError: labels are not [B, S].
        TypeError: labels are not int32 or int64.
    """
    count, device = 0, torch.device("cpu")
    for labels in microbatches:
        device = labels.device
        for row in shift_labels(labels, ignore_index).tolist():
            for target in row:
                count += target != ignore_index
    return torch.tensor(count, dtype=torch.int64, device=device)


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    cross_entropy: Callable[..., Tensor],
    num_items: int | float | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of each position's logits against the label of the next position.

    Args:
        logits: [B, S, V], any float dtype.
        labels: [B, S], int32 or int64: the tokens themselves, not shifted, ignore_index where they are no targets.
        cross_entropy: the operation of that name, of any backend.
        num_items: divides the summed loss: `count_targets` of all microbatches of the step. None for this call's own
            number of targets.
        ignore_index: the label of a position that does not count.
        label_smoothing: the share, 0 to 1, of the target spread evenly over the vocabulary.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 where there is no target.

    Raises:
        ValueError: logits is not [B, S, V], labels not [B, S], or what `cross_entropy` raises.
        TypeError: labels is not int32 or int64.
    """
    checks.dimensions("logits", logits, 3, "[B, S, V]")
    checks.shape("labels", labels, logits.shape[:2], "one label a position of logits")
    checks.dtype("labels", labels, checks.INTEGERS)
    predictions, targets = logits[:, :-1], labels[:, 1:]
    return cross_entropy(
        predictions.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        num_items=num_items,
    )
