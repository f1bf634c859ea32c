"""cut-cross-entropy, which has one operation: it never forms the logits."""

from torch import Tensor

from conformance.peers import kernels
from unsloth_ref.types import Reduction

(_linear_cross_entropy,) = kernels("cut-cross-entropy", "cut_cross_entropy:linear_cross_entropy")


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
    """With its defaults, which skip small gradients."""
    if bias is not None or logit_scale != 1.0 or label_smoothing or z_loss:
        raise NotImplementedError("cut-cross-entropy has neither bias nor logit_scale nor label_smoothing nor z_loss")
    how = reduction if num_items is None else "sum"
    loss = _linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignore_index, softcap=softcap or None, reduction=how
    )
    return loss if num_items is None else loss / num_items
