"""cut-cross-entropy, which has one operation and never materialises the logits."""

from typing import Any

from torch import Tensor

from conformance.peers import import_kernels, operation, refuse
from unsloth_ref.types import IGNORE_INDEX

(_linear_cross_entropy,) = import_kernels("cut-cross-entropy", "cut_cross_entropy:linear_cross_entropy")


@operation
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Any = None, *,
    ignore_index: int = IGNORE_INDEX, softcap: float = 0.0, reduction: str = "mean", num_items: Any = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """With the package's defaults, which skip small gradients."""
    refuse("cut-cross-entropy", {"bias": bias, **options}, bias=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0)
    how = reduction if num_items is None else "sum"
    loss = _linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignore_index, softcap=softcap or None, reduction=how
    )
    return loss if num_items is None else loss / num_items
