"""Cross entropy of logits with integer labels, with the options that language models use.

    z = softcap * tanh(logit_scale * x / softcap)        (softcap 0: z = logit_scale * x)
    lse = log(sum over V of exp(z))                      p = exp(z - lse)
    loss = (1 - s) * (lse - z[label]) + s * (lse - mean(z)) + z_loss * lse^2          s: label_smoothing
    dz = dloss * (p * (1 + 2 * z_loss * lse) - (1 - s) * onehot - s / V)
    dx = dz * (1 - (z / softcap)^2) * logit_scale

Sources: label smoothing, Szegedy et al. 2015, arXiv:1512.00567; z-loss, Chowdhery et al. 2022, arXiv:2204.02311;
softcap, Gemma 2, arXiv:2408.00118. All arithmetic is float32 for any dtype of the logits, float64 for float64.
"""

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import IGNORE_INDEX, Reduction


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Negative log likelihood of each label under the softmax of its row of logits.

    The loss and the gradient of an ignored row are exactly 0, even if its logits are NaN. If all rows are ignored, the
    loss is 0.

    Args:
        logits: [T, V], any float dtype.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
        ignore_index: the label of an ignored row.
        logit_scale: factor of the logits, applied before softcap.
        softcap: bounds the scaled logits to (-softcap, softcap); 0 for none.
        label_smoothing: the share of the target, 0 to 1, that is spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        reduction: "mean" over this call's targets, "sum", or "none".
        num_items: divides the summed loss instead of this call's number of targets (a value below 1 counts as 1): the
            number of targets in the whole batch, if this call computes one part of it. Not with "none".

    Returns:
        A scalar, or [T] for "none", in float32 (float64 for float64 logits).

    Raises:
        ValueError: wrong shapes, devices or options; on a CPU, a label outside [0, V) that is not ignore_index. On
            CUDA and in compiled code such a row has a NaN loss and gradient instead; UNSLOTH_DEBUG=1 makes CUDA raise
            too.
        TypeError: logits do not have a float dtype, or labels are not int32 or int64.
    """
    checks.reduction_arguments(reduction, num_items)
    checks.loss_arguments(logits, labels, softcap, label_smoothing, z_loss)
    if checks.values_are_checked(labels):
        checks.labels_in_vocabulary(labels, logits.shape[1], ignore_index)
    labels = labels.long()  # an int32 comparison would wrap an ignore_index beyond it
    ignored = labels == ignore_index
    outside = ~ignored & ((labels < 0) | (labels >= logits.shape[1]))

    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(wide).masked_fill(ignored[:, None], 0.0) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, -1)
    target = labels.masked_fill(ignored | outside, 0)
    losses = lse - z.gather(1, target[:, None])[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - z.mean(-1))
    if z_loss:
        losses = losses + z_loss * lse.square()
    losses = losses.masked_fill(ignored, 0.0) * torch.ones_like(losses).masked_fill(outside, float("nan"))

    if reduction == "none":
        return losses
    if num_items is None:
        num_items = (~ignored).sum() if reduction == "mean" else 1
    if isinstance(num_items, Tensor):
        return losses.sum() / num_items.to(wide).to(logits.device).clamp(min=1)
    return losses.sum() / max(num_items, 1)  # as a tensor it would have to be copied to the device
