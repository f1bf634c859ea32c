"""The loss of a training step, without a copy of the logits and without waiting for the device.

The labels are shifted, not the logits: the slice logits[:, :-1] is not contiguous, and flattening it would copy
B * S * V numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import IGNORE_INDEX, Microbatches


def shift_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Shift labels to the positions that predict them: the target of a position is the label of the next one.

    Args:
        labels: [B, S], int32 or int64.
        ignore_index: the target of the last position, which predicts nothing.

    Returns:
        [B, S] in labels.dtype; the last column is ignore_index.

    Raises:
        ValueError: labels are not [B, S].
        TypeError: labels are not int32 or int64.
    """
    checks.dimensions("labels", labels, 2, "[B, S]")
    checks.dtype("labels", labels, checks.INTEGERS)
    shifted = torch.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def count_targets(microbatches: Microbatches, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count the targets of all microbatches: labels other than ignore_index, without the first label of each row.

    Args:
        microbatches: labels [B, S] each, of any sizes, int32 or int64, all on one device.
        ignore_index: the label of tokens that are not targets.

    Returns:
        0-dim int64, on the device of the labels (on the CPU if there are no microbatches).

    Raises:
        ValueError: labels are not [B, S].
        TypeError: labels are not int32 or int64.
    """
    counts = []
    for labels in microbatches:
        checks.dimensions("labels", labels, 2, "[B, S]")
        checks.dtype("labels", labels, checks.INTEGERS)
        counts.append((labels[:, 1:] != ignore_index).sum())
    return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    cross_entropy: Callable[..., Tensor],
    num_items: int | float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the cross entropy of the logits of each position against the label of the next position.

    Args:
        logits: [B, S, V], any float dtype.
        labels: [B, S], int32 or int64: the tokens, not shifted; ignore_index at tokens that are not targets.
        cross_entropy: the operation of that name, from any backend.
        num_items: divides the summed loss; the `count_targets` of all microbatches of the step. None divides by the
            number of targets of this call.
        ignore_index: the label of tokens that are not targets.
        label_smoothing: the fraction, 0 to 1, of each target that is spread evenly over the vocabulary.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 if there are no targets.

    Raises:
        ValueError: logits are not [B, S, V] or labels not [B, S]; and whatever `cross_entropy` raises.
        TypeError: labels are not int32 or int64.
    """
    checks.dimensions("logits", logits, 3, "[B, S, V]")
    checks.shape("labels", labels, logits.shape[:2], "one label per position of logits")
    checks.dtype("labels", labels, checks.INTEGERS)
    return cross_entropy(
        logits.flatten(0, 1),
        shift_labels(labels, ignore_index).flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        num_items=num_items,
    )
