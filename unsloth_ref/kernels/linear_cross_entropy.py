"""Cross entropy of a linear layer's output, as it ends a language model: the head and the loss in one.

    x = hidden @ weight^T + bias, rounded to the dtype of hidden        loss = cross_entropy(x, labels)
    dhidden = dx @ weight        dweight = dx^T @ hidden        dbias = sum over T of dx

dx, the gradient of cross_entropy, is rounded to the dtype of hidden too, as between two modules. Products are added up
in float32 (float64 in float64).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from unsloth_ref import checks
from unsloth_ref.kernels.cross_entropy import cross_entropy
from unsloth_ref.types import Reduction


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Negative log likelihood of each label under the softmax of hidden @ weight^T + bias.

    An ignored row gives exactly 0 loss and gradient, even where hidden is NaN, and nothing to the gradients of weight
    and bias; with no target at all the loss is 0. Autocast changes nothing.

    Args:
        hidden: [T, H], any float dtype.
        weight: [V, H], in the dtype of hidden.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
        bias: [V], in the dtype of hidden; None for none.
        ignore_index: the label of a row that does not count.
        logit_scale: multiplies the logits first.
        softcap: bounds the scaled logits to (-softcap, softcap); 0 for none.
        label_smoothing: the share, 0 to 1, of the target spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        reduction: "mean" over this call's targets, "sum", or "none".
        num_items: divides the summed loss in place of this call's number of targets (less than 1 counts as 1): the
            targets of the whole batch, when this call sees one part of it. Not with "none".

    Returns:
        A scalar, or [T] for "none", in float32 (float64 for float64 inputs).

    Raises:
        ValueError: wrong shapes, devices or options; a label outside [0, V) that is not ignore_index, on a CPU. On
            CUDA, and in compiled code, such a row has NaN loss and gradients instead, unless UNSLOTH_DEBUG=1 asks for
            the check.
        TypeError: hidden not of a float dtype, weight or bias of another dtype, labels not int32 or int64.
    """
    checks.linear_loss_arguments(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, reduction, num_items)
    ignored = labels.long() == ignore_index
    with torch.autocast(hidden.device.type, enabled=False):
        # A zero, not a NaN, times the zero gradient of an ignored row adds nothing to that of weight.
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
