"""Cross entropy of a linear layer's output: the head and the loss of a language model in one operation.

    x = hidden @ weight^T + bias, rounded to the dtype of hidden        loss = cross_entropy(x, labels)
    dhidden = dx @ weight        dweight = dx^T @ hidden        dbias = sum over T of dx

Sources: those of cross_entropy. Rounding: dx, the gradient of cross_entropy, is also rounded to the dtype of hidden, as
between two modules. Matrix products are accumulated in float32 (float64 in float64).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from unsloth_ref import checks
from unsloth_ref.kernels.cross_entropy import cross_entropy
from unsloth_ref.types import IGNORE_INDEX, Reduction


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Negative log likelihood of each label under the softmax of hidden @ weight^T + bias.

    The loss and the gradient of an ignored row are exactly 0, even if hidden is NaN there, and it adds nothing to the
    gradients of weight and bias. If all rows are ignored, the loss is 0. Autocast has no effect.

    Args:
        hidden: [T, H], any float dtype.
        weight: [V, H], in the dtype of hidden.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
        bias: [V], in the dtype of hidden; None for none.
        ignore_index: the label of an ignored row.
        logit_scale: factor of the logits, applied before softcap.
        softcap: bounds the scaled logits to (-softcap, softcap); 0 for none.
        label_smoothing: the share of the target, 0 to 1, that is spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        reduction: "mean" over this call's targets, "sum", or "none".
        num_items: divides the summed loss instead of this call's number of targets (a value below 1 counts as 1): the
            number of targets in the whole batch, if this call computes one part of it. Not with "none".

    Returns:
        A scalar, or [T] for "none", in float32 (float64 for float64 inputs).

    Raises:
        ValueError: wrong shapes, devices or options; on a CPU, a label outside [0, V) that is not ignore_index. On
            CUDA and in compiled code such a row has a NaN loss and gradients instead; UNSLOTH_DEBUG=1 makes CUDA raise
            too.
        TypeError: hidden does not have a float dtype, weight or bias differs from it in dtype, or labels are not int32
            or int64.
    """
    checks.reduction_arguments(reduction, num_items)
    checks.linear_loss_arguments(hidden, weight, labels, bias, softcap, label_smoothing, z_loss)
    ignored = labels.long() == ignore_index
    with torch.autocast(hidden.device.type, enabled=False):
        # The gradient of weight multiplies these rows by zeros: a NaN would not vanish in that product.
        logits = linear(hidden.masked_fill(ignored[:, None], 0.0), weight, bias)
    return cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        num_items=num_items,
    )
