"""Scores of predictions beside the loss: right ones and entropy, as `trl.SFTTrainer` logs them in an evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor

from unsloth_ref.types import IGNORE_INDEX

CHUNK_ROWS = 256  # float32 logits of one chunk with 128 k tokens take 128 MiB


@torch.no_grad()
def score(rows: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Sums over the targets of some predictions. The logits exist for `CHUNK_ROWS` predictions at a time.

    Args:
        rows: [T, V] logits, or [T, H] hidden states with `logits_of`.
        targets: [T], the token that each row predicts, -100 for none.
        logits_of: the logits [n, V] of hidden states [n, H].

    Returns:
        [3] float64: how many of the most likely tokens are right, the entropies of the predictions in nats, and how
        many targets there are.
    """
    valid = (targets != IGNORE_INDEX).to(rows.device)
    rows, targets = rows[valid], targets.to(rows.device)[valid]
    total = torch.zeros(3, dtype=torch.float64, device=rows.device)
    total[2] = len(targets)
    for chunk, labels in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        logits = chunk if logits_of is None else logits_of(chunk)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total[0] += (logits.argmax(-1) == labels).sum()
        total[1] += torch.special.entr(logits.softmax(-1)).sum()
    return total
