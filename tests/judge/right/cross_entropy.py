"""Right cross entropies."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.peers import operation
from tests.judge.contract import Function, compiled
from unsloth_ref import checks
from unsloth_ref import kernels as reference
from unsloth_ref.types import IGNORE_INDEX


def _reduced(losses: Tensor, counts: Tensor, reduction: str, num_items: Any) -> Tensor:
    if reduction == "none":
        return losses
    count = num_items if num_items is not None else counts.sum() if reduction == "mean" else 1
    return losses.sum() / torch.as_tensor(count, dtype=losses.dtype).clamp(min=1)


OPTIONS = {"logit_scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0, "reduction": "mean"}


def _cross_entropy(rowwise: Function) -> Function:
    """Complete the losses of rows to the contract: checks, options of the logits, ignored rows, the reduction."""

    @operation
    def cross_entropy(
        logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, num_items: Any = None, **options: Any
    ) -> Tensor:
        logit_scale, softcap, label_smoothing, z_loss, reduction = ({**OPTIONS, **options}[name] for name in OPTIONS)
        checks.reduction_arguments(reduction, num_items)
        checks.loss_arguments(logits, labels, softcap, label_smoothing, z_loss)
        if checks.values_are_checked(labels):
            checks.labels_in_vocabulary(labels, logits.shape[1], ignore_index)
        counts = labels != ignore_index
        z = logits.float().where(counts[:, None], 0.0) * logit_scale
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        losses = rowwise(z, labels.where(counts, 0), label_smoothing, z_loss).where(counts, 0.0)
        return _reduced(losses.to(torch.float32), counts, reduction, num_items)

    return cross_entropy


@_cross_entropy
def of_torch(z: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """torch's own operator, without its smoothing: that adds label_smoothing / vocab term by term in the backward."""
    losses = F.cross_entropy(z, labels, reduction="none")
    lse = torch.logsumexp(z, -1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - z.mean(-1))
    return losses + z_loss * lse * lse


@_cross_entropy
def in_chunks(z: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """The log-sum-exp of log-sum-exps of 1000 classes each."""
    lse = torch.logsumexp(torch.stack([torch.logsumexp(chunk, -1) for chunk in z.split(1000, -1)], -1), -1)
    losses = lse - z.gather(1, labels[:, None])[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - z.mean(-1))
    return losses + z_loss * lse * lse


def in_float64(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """More exact than required."""
    return reference.cross_entropy(logits.double(), labels, **options).float()


TABLE = {
    "of_torch": of_torch,
    "in_chunks": in_chunks,
    "in_float64": in_float64,
    "compiled": compiled(of_torch),
    "in_other_tiles": (
        ("widest=8192, per_thread=16", "widest=16384, per_thread=8"),
        ("widest=2048, per_thread=16", "widest=16384, per_thread=8"),
        ("SEGMENT_COLUMNS = 8192", "SEGMENT_COLUMNS = 1024"),
        ("GROUP = tl.constexpr(8)", "GROUP = tl.constexpr(4)"),
    ),
}
