"""liger-kernel, as its users call it: its own defaults, in place where it is in place.

What it cannot express raises NotImplementedError, and shows as a failure of the law that asked for it.
"""

from torch import Tensor

from conformance.trial import BackendError
from unsloth_ref.types import Casting, Reduction

try:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    raise BackendError("backend: liger needs the package liger-kernel, which is not installed") from missing


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """As LigerRMSNorm: the backward pass writes over grad_output."""
    return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, True)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As LigerSwiGLUMLP: the backward pass writes over gate and up."""
    return LigerSiLUMulFunction.apply(gate, up)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """As LigerCrossEntropyLoss: the forward pass writes the gradient over the logits."""
    if logit_scale != 1.0 or num_items is not None:
        raise NotImplementedError("liger-kernel has neither logit_scale nor num_items")
    found = LigerCrossEntropyFunction.apply(
        logits, labels, None, ignore_index, z_loss, label_smoothing, reduction, softcap or None
    )
    return found[0]
